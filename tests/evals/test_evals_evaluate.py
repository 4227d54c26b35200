"""The evaluation step: benchmarks put by the harness, in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evals.lm_eval_oracle import tiny

from treadle.cli.targets import load
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, read_manifest
from treadle.core.progress import Silent
from treadle.evals.commonsense import ARC
from treadle.evals.evaluate import Evaluate
from treadle.evals.harness import evaluate
from treadle.evals.rows import Examples
from treadle.evals.wikitext import WikiText
from treadle.models.hub.load import load_model
from treadle.models.source import Pretrained
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.train.precision import FP32


def test_benchmarks_in_a_pipeline(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", context=64, scale=2.0)
    rows = [{"query": f"{i}?", "choices": ["the sun", "water"], "gold": i % 2} for i in range(6)]
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "wiki.txt").write_text("\n = One = \n\n energy , food \n\n = Two = \n\n heat . \n")
    tasks = (
        ARC(rows=Examples(path=str(tmp_path / "arc.jsonl"))),
        WikiText(rows=Examples(path=str(tmp_path / "wiki.txt"))),
    )
    step = Evaluate(
        name="measure",
        subject="base",
        model=Pretrained(name=str(model.folder)),
        benchmarks=tasks,
        precision=FP32(),
    )
    execute(Pipeline(name="test", steps=(step,)), tmp_path / "run", Silent())
    found = read_manifest(tmp_path / "run/measure")["metrics"]["results"]
    loaded = load_model(model.folder).model
    expected = evaluate(loaded, Tokenizer.load(model.folder), tasks).by_name()
    assert found.keys() == expected.keys()
    assert found["arc acc"] == pytest.approx(expected["arc acc"])
    assert found["wikitext word_perplexity"]["value"] == pytest.approx(
        expected["wikitext word_perplexity"]["value"], rel=1e-5
    )
    assert found["wikitext word_perplexity"]["n"] == 2
    whole = json.loads((tmp_path / "run/measure/benchmarks.json").read_text())
    assert set(whole["tasks"]) == {"arc", "wikitext"}
    assert len(list((tmp_path / "run/measure/records").rglob("*.jsonl"))) == 2


def test_the_standard_benchmarks_are_a_recipe() -> None:
    (step,) = load("standard-benchmarks").steps
    assert isinstance(step, Evaluate)
    names = [task.name for task in step.benchmarks]
    assert names == [
        "arc-easy",
        "arc-challenge",
        "piqa",
        "hellaswag",
        "winogrande",
        "boolq",
        "mmlu",
        "gsm8k",
        "wikitext",
    ]
