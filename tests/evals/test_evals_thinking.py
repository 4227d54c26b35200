"""Measuring models that reason: distances against full distributions, figures of a whole step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.batch import Piece
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.evals.evaluate import Exam
from treadle.evals.thinking import MeasureThinking, distances, mean_of
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class SeededBytes(ModelSource):
    seed: int = 0

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(seed=self.seed), folder)


class Even(Problems):
    """Right is a visible text that begins with an even byte."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "even", "even")

    def score(self, problem: Problem, completion: str) -> float:
        return float(bool(completion) and ord(completion[0]) % 2 == 0)


@torch.inference_mode()
def test_distances_are_those_of_whole_distributions() -> None:
    """Against float64 sums over the vocabulary, one sequence and one token at a time."""
    p, q = tiny_model(), tiny_model(seed=1)
    answers = [((1, 2, 3), (7, 8)), ((4, 5), (9, 10, 11)), ((6,), (12,))]
    pieces = [Piece((*a, *b), [False] * len(a) + [True] * len(b)) for a, b in answers]
    expected = []
    for prompt, answer in answers:
        tokens = torch.tensor([*prompt, *answer])
        logs = [m.logits(m(tokens)).double().log_softmax(-1).numpy() for m in (p, q)]
        rows = range(len(prompt) - 1, len(tokens) - 1)
        expected.append(
            np.mean([(np.exp(logs[0][t]) * (logs[0][t] - logs[1][t])).sum() for t in rows])
        )
    for tokens in (4, 100):  # one by one, and all in one pass
        assert distances(p, q, pieces, tokens) == pytest.approx(expected, rel=1e-4)
    assert distances(p, p, pieces, 100) == pytest.approx([0.0] * 3, abs=1e-6)


def test_means_have_normal_intervals() -> None:
    found = mean_of([1.0, 2.0, 6.0], "tokens")
    error = np.std([1.0, 2.0, 6.0], ddof=1) / math.sqrt(3)
    assert found["value"] == 3.0
    assert found["low"] == pytest.approx(3 - 1.96 * error)
    assert found["high"] == pytest.approx(3 + 1.96 * error)
    assert mean_of([2.0], "nats")["low"] is None
    assert mean_of([1.0, 3.0], "nats")["low"] == pytest.approx(2 - 1.96)


def test_a_stage_is_measured(tmp_path: Path) -> None:
    exams = (
        Exam(name="even", problems=Even(), count=6),
        Exam(name="odd", problems=Even(), count=2),
    )
    step = MeasureThinking(
        name="measure",
        subject="base",
        model=SeededBytes(),
        exams=exams,
        against=SeededBytes(seed=3),
        sampling=Sampling(temperature=0.0, max_tokens=12),
        precision=FP32(),
    )
    execute(Pipeline(name="p", steps=(step,)), tmp_path)
    metrics = read_manifest(tmp_path / "measure")["metrics"]
    results = metrics["results"]
    lines = (tmp_path / "measure/samples.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert results["overall"]["value"] == pytest.approx(sum(scores) / 8)
    assert results["even"]["value"] == pytest.approx(sum(scores[:6]) / 6)
    assert results["answer length"]["unit"] == "tokens"
    assert 0 < results["answer length"]["value"] <= 12
    assert results["format kept"]["value"] == 0.0
    assert results["KL"]["value"] > 0.01
    assert 0 <= metrics["cut_off"] <= 1
    alone = step.replace(name="alone", exams=exams[1:], against=None)
    execute(Pipeline(name="p", steps=(alone,)), tmp_path)
    results = read_manifest(tmp_path / "alone")["metrics"]["results"]
    assert set(results) == {"odd", "answer length", "format kept"}


def test_a_model_with_other_tokens_is_refused(tmp_path: Path) -> None:
    class Wider(ModelSource):
        """A model of more tokens."""

        def open(self, workspace: Workspace) -> Opened:
            return Opened(tiny_model().config.replace(vocab=300).build(), workspace.folder)

    step = MeasureThinking(
        name="measure",
        subject="base",
        model=SeededBytes(),
        exams=(Exam(name="even", problems=Even(), count=1),),
        against=Wider(),
        precision=FP32(),
    )
    with pytest.raises(TreadleError, match="has 300 tokens, the one that is measured 257"):
        execute(Pipeline(name="p", steps=(step,)), tmp_path)
