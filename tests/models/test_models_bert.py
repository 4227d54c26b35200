"""BERT against transformers: the same weights give the same states, logits and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from models.bert_pair import LENGTHS, SIZE, texts, their_inputs, wave
from torch.testing import assert_close

from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.bert import FAMILY, bert_base, minilm_l6
from treadle.models.bert_heads import PoolerHead, PretrainingHead
from treadle.models.hub.fill import applicable
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.tokenizers.tokenizer import Tokenizer

CLASSES = ("BertModel", "BertForMaskedLM", "BertForPreTraining")


def save_theirs(name: str, folder: Path, **fields: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZE, **fields})
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wild = torch.randn_like(parameter) * 0.25
            parameter.copy_(wild if parameter.ndim > 1 else parameter + wild)
    model.save_pretrained(folder)
    return model


def first_tokens() -> list[int]:
    return list(Layout(LENGTHS).starts)


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_theirs(name, tmp_path).double()
    model = load_model(tmp_path, dtype=torch.float64).model
    tokens, types = texts()
    hidden = model(tokens, Packed.of(Layout(LENGTHS), types=types))
    real = their_inputs()["attention_mask"].bool()
    output = theirs(**their_inputs(), output_hidden_states=True)
    assert_close(hidden, output.hidden_states[-1][real])
    if name == "BertModel":
        assert isinstance(model.head, PoolerHead)
        ours, expected = (
            [hidden, model.head(hidden[first_tokens()])],
            [
                output.last_hidden_state[real],
                output.pooler_output,
            ],
        )
    elif name == "BertForMaskedLM":
        ours, expected = [model.logits(hidden)], [output.logits[real]]
    else:
        assert isinstance(model.head, PretrainingHead)
        ours = [model.logits(hidden), model.head.follows(hidden[first_tokens()])]
        expected = [output.prediction_logits[real], output.seq_relationship_logits]
    for mine, their in zip(ours, expected, strict=True):
        assert_close(mine, their)
    torch.stack([wave(t) for t in ours]).sum().backward()
    torch.stack([wave(t) for t in expected]).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    prefix = "" if name != "BertModel" else "bert."
    found = {n: p.grad for n, p in model.named_parameters()}
    for rule in applicable(model, FAMILY.huggingface.rules(model.config)):
        (mine,) = (found.pop(n) for n in rule.ours)
        assert_close(mine, gradients.pop(rule.theirs[0].removeprefix(prefix)))
    assert not found
    assert not gradients


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_reads_what_was_saved(name: str, tmp_path: Path) -> None:
    theirs = save_theirs(name, tmp_path / "a", hidden_act="relu", type_vocab_size=3)
    save_hf(load_model(tmp_path / "a").model, tmp_path / "b")
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (mine, a), (their, b) in zip(
        again.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine == their
        assert torch.equal(a, b)
    ours, wanted = again.eval()(**their_inputs())[0], theirs(**their_inputs())[0]
    assert_close(ours, wanted)
    assert load_model(tmp_path / "b").model.config == load_model(tmp_path / "a").model.config


def test_packing_changes_nothing(tmp_path: Path) -> None:
    """Tokens of one document do not see another's, though nothing is causal."""
    save_theirs("BertModel", tmp_path)
    model = load_model(tmp_path).model
    tokens, types = texts()
    packed = model(tokens, Packed.of(Layout(LENGTHS), types=types))
    alone = [
        model(t, Packed.of(Layout((len(t),)), types=k))
        for t, k in zip(tokens.split(LENGTHS), types.split(LENGTHS), strict=True)
    ]
    assert_close(packed, torch.cat(alone))
    assert_close(model(tokens[:9]), model(tokens[:9], Packed.of(Layout((9,)))))
    assert not torch.allclose(packed[:9], model(tokens[:9]))


def test_presets_have_the_published_size() -> None:
    for encoder, parameters in ((bert_base(), 109_482_240), (minilm_l6(), 22_713_216)):
        with torch.device("meta"):
            assert sum(p.numel() for p in encoder.build().parameters()) == parameters


def test_what_an_encoder_cannot_do_is_refused(tmp_path: Path) -> None:
    save_theirs("BertForMaskedLM", tmp_path)
    model = load_model(tmp_path).model.eval()
    engine = Engine(model, Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))))
    with pytest.raises(TreadleError, match=r"is an encoder.*treadle predict"):
        engine.generate([Request((1, 2), Sampling())])
    with pytest.raises(TreadleError, match="ends in a MaskedHead, which predicts no next token"):
        model.head_weight()
    with pytest.raises(ConfigError, match="no GGUF architecture"):
        save_gguf(model, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("position_embedding_type", "relative_key", "position_embedding_type"),
        ("is_decoder", True, "is_decoder"),
        ("architectures", ["BertForQuestionAnswering"], "BertForQuestionAnswering has a head for"),
        ("hidden_act", "mish", "mish"),
    ],
)
def test_configs_that_are_not_read(key: str, value: Any, said: str, tmp_path: Path) -> None:
    save_theirs("BertModel", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ConfigError, match=said):
        load_model(tmp_path)


def test_real_minilm_matches_transformers(minilm: Path) -> None:
    """The real weights and the real tokenizer, on a pair and on texts of unequal length."""
    tokenizer = Tokenizer.load(minilm)
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    model = load_model(minilm).model
    words = ["The loom was still warm.", "Ünïcode, and a much longer text about weaving."]
    fast = transformers.AutoTokenizer.from_pretrained(minilm)
    expected = theirs(**fast(words, padding=True, return_tensors="pt")).last_hidden_state
    ids = [tokenizer.encode(w, add_special=True) for w in words]
    assert ids == fast(words)["input_ids"]
    with torch.no_grad():
        hidden = model(
            torch.tensor([i for row in ids for i in row]), Packed.of(Layout(tuple(map(len, ids))))
        )
    for part, row in zip(hidden.split([len(i) for i in ids]), expected, strict=True):
        assert_close(part, row[: len(part)], atol=1e-5, rtol=1e-4)
        assert F.cosine_similarity(part, row[: len(part)]).min() > 0.999999
