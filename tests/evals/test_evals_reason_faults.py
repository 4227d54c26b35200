"""Strategies side by side: what is reported of answers, and of a verifier that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.core.progress import Silent
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.evals import evaluate
from treadle.evals.evaluate import Exam
from treadle.evals.reason import sit
from treadle.inference.engine import Engine
from treadle.inference.reasoning.prompting import OneAnswer
from treadle.inference.reasoning.votes import BestOfN, ByVerifier
from treadle.inference.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class Moody(Problems):
    """Right is an answer to an even question; an odd one cannot be verified."""

    always: bool = False

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "", "any", {"odd": index % 2 == 1})

    def score(self, problem: Problem, completion: str) -> float:
        if self.always or problem.metadata["odd"]:
            raise ZeroDivisionError("oops")
        return 1.0


def engine() -> Engine:
    return Engine(tiny_model(), byte_tokenizer().with_template(TEMPLATE))


@pytest.mark.parametrize(
    "strategy",
    [
        OneAnswer(sampling=Sampling(max_tokens=4)),
        BestOfN(n=2, sampling=Sampling(max_tokens=4), by=ByVerifier()),
    ],
)
def test_a_verifier_that_fails_is_counted(strategy: OneAnswer | BestOfN, tmp_path: Path) -> None:
    mind = engine()
    here = Env(tiny_model(), mind.tokenizer, tmp_path)
    exam = Exam(name="moody", problems=Moody(), count=5, first=10)
    row, said = sit(mind, strategy, exam, here, Silent())
    assert row["accuracy"]["value"] == 3 / 5
    assert [a["failure"] for a in said] == ["", "ZeroDivisionError: oops"] * 2 + [""]
    assert [a["score"] for a in said] == [1.0, 0.0] * 2 + [1.0]
    assert [a["problem"] for a in said] == [f"moody-{i}" for i in range(10, 15)]
    assert row["tokens"] == sum(a["tokens"] for a in said) / 5
    with pytest.raises(TreadleError, match="the verifier failed for all 2 completions"):
        sit(
            mind, strategy, Exam(name="moody", problems=Moody(always=True), count=2), here, Silent()
        )


def test_an_exam_outlives_a_verifier_that_fails() -> None:
    exam, sampling = Exam(name="moody", problems=Moody(), count=5), Sampling(max_tokens=4)
    sitting = evaluate.sit(engine(), exam, sampling, Silent())
    assert [s["score"] for s in sitting.samples] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert sitting.failed == 2
    with pytest.raises(TreadleError, match="the verifier failed for all 2 completions"):
        evaluate.sit(
            engine(),
            Exam(name="moody", problems=Moody(always=True), count=2),
            sampling,
            Silent(),
        )


class Endless(Problems):
    """The verifier of an odd question never comes to an end."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "", "any", {"odd": index % 2 == 1})

    def score(self, problem: Problem, completion: str) -> float:
        while problem.metadata["odd"]:
            pass
        return 1.0


@pytest.mark.skipif(os.name != "posix", reason="without a timer's signal there is no limit")
def test_patience_is_the_exam_s() -> None:
    exam = Exam(name="endless", problems=Endless(), count=3, patience=0.05)
    sitting = evaluate.sit(engine(), exam, Sampling(max_tokens=4), Silent())
    assert [s["score"] for s in sitting.samples] == [1.0, 0.0, 1.0]
    assert sitting.failed == 1
