"""Forgetting scores beside numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Step, Workspace, read_manifest
from treadle.core.progress import Silent
from treadle.evals.forgetting import ForgettingScore, Stage, forgetting


class FakeExams(Step):
    """Results as an `Evaluate` gives them."""

    values: tuple[float, ...]
    tasks: tuple[str, ...] = ("a", "b", "c")

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        pairs = zip(self.tasks, self.values, strict=True)
        return {"kind": "evaluation", "results": {t: {"value": v} for t, v in pairs}}


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


TABLE = ((0.9, 0.2, 0.1), (0.6, 0.8, 0.1), (0.5, 0.9, 0.7))


def test_scores_by_hand() -> None:
    found = forgetting(TABLE)
    assert found.accuracy == pytest.approx(2.1 / 3)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)
    late = forgetting(((0.3, 0.9, 0.0), (0.7, 0.5, 0.0), (0.6, 0.4, 1.0)))
    assert late.forgetting == pytest.approx(((0.7 - 0.6) + (0.9 - 0.4)) / 2)


def test_it_reads_the_stages_of_a_pipeline(tmp_path: Path) -> None:
    measures = tuple(FakeExams(name=f"m{i}", values=row) for i, row in enumerate(TABLE))
    stages = tuple(Stage(step=f"m{i}", task=task) for i, task in enumerate("abc"))
    score = ForgettingScore(name="score", stages=stages)
    lines = Lines()
    execute(Pipeline(name="p", steps=(*measures, score)), tmp_path, lines)
    expected = "score: accuracy 70% over all tasks, forgotten 15%, backward transfer -15%"
    assert expected in lines.said
    metrics = read_manifest(tmp_path / "score")["metrics"]
    assert metrics["backward_transfer"] == pytest.approx(-0.15)
    assert metrics["accuracies"][2] == list(TABLE[2])
    odd = ForgettingScore(name="odd", stages=(stages[0], Stage(step="m1", task="bee")))
    with pytest.raises(TreadleError, match="`m0` has no result for `bee`"):
        execute(Pipeline(name="q", steps=(*measures, odd)), tmp_path / "q")
