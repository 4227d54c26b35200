"""Embedding models of sentence-transformers: their pooling is read, their vectors are ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_readers import tiny_decoder, tiny_encoder
from torch.testing import assert_close

from treadle.core.errors import ConfigError, FileFormatError, TreadleError
from treadle.inference.reader import Reader, unit
from treadle.models.heads import ClassHead, VectorReadout
from treadle.models.hub.load import load_model
from treadle.models.hub.sentence import pooling_of, with_vectors
from treadle.models.pooling import FirstToken, LastToken, MeanPooling
from treadle.models.source import Opened
from treadle.tokenizers.tokenizer import Tokenizer

TEXTS = (
    "The loom was still warm.",
    "Who wove this?",
    "Ünïcode — and a much longer text about weaving, " * 20,
)


def test_real_vectors_match_sentence_transformers(minilm: Path) -> None:
    opened = Opened(load_model(minilm).model, minilm)
    reader = Reader(with_vectors(opened), Tokenizer.load(minilm), longest=256)
    ours = unit(reader.texts([(t, None) for t in TEXTS]))
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(
        list(TEXTS), convert_to_tensor=True
    )
    assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert_close(unit(ours, 64).norm(dim=1), torch.ones(3))


def describe(folder: Path, config: dict[str, object], *more: str) -> Path:
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"path": "" if k == "Transformer" else k, "type": f"sentence_transformers.models.{k}"}
        for k in kinds
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "Pooling").mkdir(exist_ok=True)
    (folder / "Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def test_poolings_are_read(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) is None
    for config, pooling in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, FirstToken()),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, LastToken()),
        ({"pooling_mode_mean_tokens": True}, MeanPooling()),
    ):
        assert pooling_of(describe(tmp_path, config, "Normalize")) == pooling
    describe(tmp_path, {"pooling_mode_cls_token": True})
    head = with_vectors(Opened(tiny_encoder(), tmp_path)).head
    assert isinstance(head, VectorReadout)
    assert head.pooling == FirstToken()


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    for config in (
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {},
    ):
        with pytest.raises(ConfigError, match="is not treadle's: it has mean, cls, lasttoken"):
            pooling_of(describe(tmp_path, config))
    with pytest.raises(ConfigError, match="a Dense is no part"):
        pooling_of(describe(tmp_path, {"pooling_mode_mean_tokens": True}, "Dense"))
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(FileFormatError, match=r"modules.json: cannot be read"):
        pooling_of(tmp_path)
    labelled = ClassHead(labels=("a", "b"))(tiny_decoder())
    with pytest.raises(TreadleError, match="use `treadle predict`"):
        with_vectors(Opened(labelled, tmp_path))
