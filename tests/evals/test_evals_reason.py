"""Strategies side by side: what is counted, what is private, how a strategy is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.core.progress import Silent
from treadle.core.results import wilson
from treadle.data.problems import Problems
from treadle.data.records import Message, Problem, user
from treadle.evals.evaluate import Exam
from treadle.evals.reason import Reason, label, table
from treadle.inference.reasoning.prompting import FewShot, OneAnswer, Shot
from treadle.inference.reasoning.strategy import Ask, Strategy, Thinker, Thought, Turns
from treadle.inference.reasoning.tree import Beam, TreeOfThoughts
from treadle.inference.reasoning.votes import SelfConsistency
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class Doubled(Problems):
    """Twice a number; right is a text that says it and nothing else."""

    def problem(self, index: int) -> Problem:
        return Problem((Message("system", "double"), user(f"{index}?")), str(2 * index), "doubled")

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


class Oracle(Strategy):
    """Knows the answers to numbers below `wise`, and looks a right one up with its verifier."""

    wise: int = 3
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=4)

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        thinker.ask([Ask(i, turns) for i, turns in enumerate(questions)], self.sampling)
        thoughts = []
        for i, turns in enumerate(questions):
            number = int(turns[-1]["content"].rstrip("?"))
            assert [turn["role"] for turn in turns] == ["system", "user"]
            assert thinker.verify is not None
            assert [n for n in range(20) if thinker.verify(i, str(n))] == [2 * number]
            said = 2 * number if number < self.wise else "lost"
            thoughts.append(thinker.thought(i, f"<think>{number} twice</think>\n{said}"))
        return thoughts


class Template(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(), folder)


def test_every_strategy_sits_every_exam(tmp_path: Path) -> None:
    exams = (
        Exam(name="early", problems=Doubled(), count=4),
        Exam(name="late", problems=Doubled(), first=2, count=2),
    )
    step = Reason(
        name="reason",
        model=Template(),
        strategies=(Oracle(), Oracle(wise=2)),
        exams=exams,
        precision=FP32(),
    )
    execute(Pipeline(name="p", steps=(step,)), tmp_path, Silent())
    metrics = read_manifest(tmp_path / "reason")["metrics"]
    rows = metrics["rows"]
    assert metrics["kind"] == "reasoning"
    found = [(r["strategy"], r["exam"], r["accuracy"]["value"], r["accuracy"]["n"]) for r in rows]
    assert found == [
        ("Oracle", "early", 0.75, 4),
        ("Oracle", "late", 0.5, 2),
        ("Oracle wise=2", "early", 0.5, 4),
        ("Oracle wise=2", "late", 0.0, 2),
    ]
    assert (rows[0]["accuracy"]["low"], rows[0]["accuracy"]["high"]) == wilson(3, 4)
    answers = json.loads((tmp_path / "reason" / "answers.json").read_text())
    assert [a["problem"] for a in answers[:6]] == [
        *(f"early-{i}" for i in range(4)),
        *("late-2", "late-3"),
    ]
    last = {key: answers[5][key] for key in ("question", "answer", "reasoning", "score")}
    assert last == {"question": "3?", "answer": "lost", "reasoning": "3 twice", "score": 0.0}
    assert answers[2]["answer"] == "4"
    for row, mine in ((rows[0], answers[:4]), (rows[1], answers[4:6])):
        assert all(0 < a["tokens"] <= 4 for a in mine)
        assert row["tokens"] == sum(a["tokens"] for a in mine) / len(mine)
        assert row["seconds"] > 0


def test_only_what_differs_is_said() -> None:
    assert label(Oracle(sampling=Sampling(temperature=0.0, max_tokens=4))) == "Oracle"
    assert label(Oracle(wise=9, sampling=Sampling())) == "Oracle wise=9 sampling=Sampling"
    assert label(OneAnswer()) == "OneAnswer"
    assert label(TreeOfThoughts(search=Beam(width=2, depth=4))) == (
        "TreeOfThoughts search=Beam(width=2, depth=4)"
    )
    sampling = Sampling(temperature=1.0, max_tokens=192)
    shots = FewShot(shots=(Shot(question="?", answer="!"),))
    assert label(SelfConsistency(n=2, sampling=sampling, prompt=shots)) == (
        "SelfConsistency n=2 prompt=FewShot(shots=1) sampling=Sampling(max_tokens=192)"
    )


def test_the_cheapest_comes_first() -> None:
    figure = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "unit": "accuracy"}
    rows = [
        {"strategy": s, "exam": e, "accuracy": figure, "tokens": t, "seconds": 1.25, "overflows": 0}
        for s, e, t in (("slow", "b", 90.0), ("dear", "a", 70.0), ("quick", "b", 8.0))
    ]
    lines = [line.split() for line in table(rows)]
    assert [line[0] for line in lines] == ["strategy", "dear", "quick", "slow"]
    assert lines[2] == ["quick", "b", "0.500", "0.25", "to", "0.75", "8", "1.2"]
