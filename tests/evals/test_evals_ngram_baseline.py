"""The n-gram baseline: same tokens as a model, figures by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Silent
from treadle.data.documents import Documents
from treadle.data.records import Text
from treadle.evals.evaluate import Reading, perplexity, take_tokens
from treadle.evals.ngram import KneserNey
from treadle.evals.ngram_baseline import NgramBaseline, predict
from treadle.models.source import ModelSource, Opened

PROSE = (
    "The loom is warped and the threads are tied to the treadle.",
    "Each treadle lifts a shaft, and each shaft lifts its threads; the weaver sends the shuttle.",
    "A naïve weaver forgets the selvedge: the edge then frays, and the cloth is lost.",
) * 8
HELD_OUT = ("The weaver lifts the shaft and the naïve shuttle frays the edge of the cloth.",) * 3


class FewTexts(Documents):
    """A little prose."""

    def training(self) -> Iterator[Text]:
        return map(Text, PROSE)

    def held_out(self) -> Iterator[Text]:
        return map(Text, HELD_OUT)


class ByteModel(ModelSource):
    """A tiny model whose tokens are bytes."""

    folder: str

    def open(self, workspace: Workspace) -> Opened:
        byte_tokenizer().save(self.folder)
        return Opened(tiny_model(), Path(self.folder))


READING = Reading(name="prose", documents=FewTexts(), tokens=150, context=64)


def manifest(root: Path, baseline: NgramBaseline) -> dict[str, object]:
    execute(Pipeline(name="p", steps=(baseline,)), root)
    found: dict[str, object] = json.loads((root / "ngram" / "manifest.json").read_text())["metrics"]
    return found


def step(tmp_path: Path, **changes: object) -> NgramBaseline:
    fields = {
        "model": ByteModel(folder=str(tmp_path / "tokenizer")),
        "documents": FewTexts(),
        "readings": (READING,),
        **changes,
    }
    return NgramBaseline(**fields)  # type: ignore[arg-type]


def test_it_predicts_the_tokens_that_a_model_predicts() -> None:
    tokenizer = byte_tokenizer()
    ngrams = KneserNey(order=3).build([list(t.encode()) for t in PROSE], tokenizer.vocab_size)
    found = predict(ngrams, tokenizer, READING)
    assert found.perplexity["n"] == perplexity(tiny_model(), tokenizer, READING, Silent())["n"]


def test_figures_by_hand() -> None:
    tokenizer = byte_tokenizer()
    ngrams = KneserNey(order=3).build([list(t.encode()) for t in PROSE], tokenizer.vocab_size)
    tokens = take_tokens(tokenizer, READING)
    logs = [
        float(ngrams.logprobs([tokens[start:end]])[-1])
        for start in range(0, len(tokens), 64)
        for end in range(start + 2, min(start + 64, len(tokens)) + 1)
    ]
    found = predict(ngrams, tokenizer, READING)
    assert found.perplexity["n"] == len(logs)
    assert found.perplexity["value"] == pytest.approx(math.exp(-np.mean(logs)))
    # Its tokens are bytes.
    assert found.bits_per_byte["value"] == pytest.approx(-np.mean(logs) / math.log(2))
    for figure in (found.perplexity, found.bits_per_byte):
        assert figure["low"] is not None
        assert figure["high"] is not None
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_the_step_records_a_baseline(tmp_path: Path) -> None:
    metrics = manifest(tmp_path, step(tmp_path, ngrams=KneserNey(order=4)))
    assert (metrics["kind"], metrics["subject"], metrics["baseline"]) == (
        "evaluation",
        "4-gram",
        True,
    )
    tokens = sum(len(t.encode()) + 2 for t in PROSE)
    assert metrics["training_tokens"] == tokens
    results = metrics["results"]
    assert isinstance(results, dict)
    assert set(results) == {"prose"}
    assert 1 < results["prose"]["value"] < 12  # of 257 bytes


def test_it_counts_no_more_than_it_is_told(tmp_path: Path) -> None:
    few = manifest(tmp_path, step(tmp_path, tokens=100))
    assert few["training_tokens"] == 100
