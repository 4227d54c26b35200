"""Rounds of comparing and training: they help, and they go on where they were stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.agreement import Agreement, first_order
from treadle.alignment.feedback import ByMarks, Comparison, Labeller, Verdict
from treadle.alignment.iterate import Compare, PairsOf, WinRate, judged
from treadle.alignment.judge import verdict
from treadle.alignment.preferences import PairFiles, Preferences
from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.split import LeakFreeSplit
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit
from treadle.train.precision import FP32
from treadle.train.run import Run, Trained

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
SAMPLING = Sampling(max_tokens=8)
PIPELINE = Pipeline(name="p", steps=())


class IteratedModel(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model().train(), folder)


class IteratedLetters(Problems):
    """The share of letters."""

    flat: bool = False

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index % 5}"),), "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        good = sum(c.isascii() and c.isalpha() for c in completion) / max(1, len(completion))
        return 1.0 if self.flat else good


class Backwards(Labeller):
    """Calls the worse answer better, half sure."""

    def __call__(self, comparisons, problems, workspace):
        found = ByMarks()(comparisons, problems, workspace)
        return [Verdict(0.5 - (v.first_better - 0.5) / 2, bias=0.25) for v in found]


def compare(**changes) -> Compare:
    config = Compare(
        precision=FP32(),
        name="label-1",
        model=IteratedModel(),
        problems=IteratedLetters(),
        count=48,
        completions=4,
        sampling=SAMPLING,
    )
    return config.replace(**changes)


def rounds() -> Pipeline:
    steps, now = [], IteratedModel()
    for number in (1, 2):
        steps.append(compare(name=f"label-{number}", model=now, first=100 * number))
        steps.append(
            Run(
                name=f"round-{number}",
                model=now,
                source=Preferences(pairs=PairsOf(step=f"label-{number}"), per_step=16),
                objective=DPO(beta=0.1),
                optimizer=AdamW(lr=3e-3),
                schedule=Constant(),
                fit=Fit(steps=10, precision=FP32()),
            )
        )
        now = Trained(step=f"round-{number}")
        steps.append(
            WinRate(
                precision=FP32(),
                name=f"win-{number}",
                subject=f"round-{number}",
                model=now,
                against=IteratedModel(),
                problems=IteratedLetters(),
                count=64,
                sampling=SAMPLING,
            )
        )
    return Pipeline(name="rounds", steps=tuple(steps))


def test_win_rates_rise_and_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    execute(rounds(), whole)
    rates = [
        read_manifest(whole / f"win-{n}")["metrics"]["results"]["win rate"]["value"] for n in (1, 2)
    ]
    assert rates[0] > 0.6
    assert rates[1] > 0.75
    original = Compare.execute

    def stop_in_round_two(step: Compare, workspace: Workspace):
        if step.name == "label-2":
            raise KeyboardInterrupt
        return original(step, workspace)

    with monkeypatch.context() as patch:
        patch.setattr(Compare, "execute", stop_in_round_two)
        with pytest.raises(KeyboardInterrupt):
            execute(rounds(), cut)
    execute(rounds(), cut)
    for name in ("label-1", "label-2"):
        assert (cut / name / "pairs.jsonl").read_text() == (
            whole / name / "pairs.jsonl"
        ).read_text()


def test_pairs_are_written_as_they_were_judged(tmp_path: Path) -> None:
    execute(Pipeline(name="p", steps=(compare(labeller=Backwards()),)), tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "label-1" / "pairs.jsonl").read_text().splitlines()]
    judge = IteratedLetters()
    metrics = read_manifest(tmp_path / "label-1")["metrics"]
    assert len(rows) == metrics["decided"] > 10
    assert metrics["position_bias"] == 0.25
    assert metrics["compared"] + metrics["same_or_empty"] == 48 * 2
    problem = judge.problem(0)
    for row in rows:
        assert judge.score(problem, row["chosen"]) < judge.score(problem, row["rejected"])
        assert row["confidence"] == 0.75


class Unruly(IteratedLetters):
    """A verifier that crashes, hangs, or gives no number, as the answer tells it to."""

    def score(self, problem: Problem, completion: str) -> float:
        if completion == "crash":
            raise ZeroDivisionError("oops")
        while completion == "hang":
            pass
        return math.nan if completion == "nan" else super().score(problem, completion)


def test_a_verifier_that_fails_costs_its_pair_and_not_the_run(tmp_path: Path) -> None:
    problems = Unruly()
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()))
    pairs = [("ab", "crash"), ("hang", "ab"), ("nan", "nan"), ("ab", "1")]
    comparisons = [Comparison(problems.problem(0), a, b) for a, b in pairs]
    verdicts = ByMarks(patience=0.2)(comparisons, problems, workspace)
    assert [v.first_better for v in verdicts] == [0.5, 0.5, 0.5, 1.0]
    assert [v.failure for v in verdicts] == [
        "ZeroDivisionError: oops",
        "OvertimeError: no answer within 0.2 s",
        "the reward was nan",
        "",
    ]
    assert judged(verdicts) == {"verdicts_failed": 3.0}
    with pytest.raises(TreadleError, match="the verifier failed for all 2 completions"):
        ByMarks()(comparisons[2:3], problems, workspace)


class LongAtTimes(IteratedLetters):
    """Every second prompt fills the context."""

    def problem(self, index: int) -> Problem:
        return Problem((user("long " * 60 if index % 2 else "short"),), "", "letters")


def test_prompts_beyond_the_context_are_counted(tmp_path: Path) -> None:
    step = compare(problems=LongAtTimes(), count=16)
    execute(Pipeline(name="p", steps=(step,)), tmp_path)
    metrics = read_manifest(tmp_path / "label-1")["metrics"]
    assert metrics["prompts_too_long"] == 8
    assert metrics["compared"] + metrics["same_or_empty"] == 32
    assert metrics["same_or_empty"] >= 16
    rows = [json.loads(x) for x in (tmp_path / "label-1" / "pairs.jsonl").read_text().splitlines()]
    assert {r["prompt"][0]["content"] for r in rows} == {"short"}


def test_win_rates_count_what_was_decided(tmp_path: Path) -> None:
    """A doubtful win is a win; prompts without room are counted."""

    class Leaning(Labeller):
        def __call__(self, comparisons, problems, workspace):
            return [Verdict(p) for p in (0.6, 0.5, 0.1, 0.9)]

    step = WinRate(
        precision=FP32(),
        name="win",
        subject="s",
        model=IteratedModel(),
        against=IteratedModel(),
        problems=LongAtTimes(),
        count=4,
        sampling=SAMPLING,
        labeller=Leaning(),
    )
    found = step.execute(Workspace(tmp_path, tmp_path, PIPELINE))
    assert found["results"]["win rate"]["value"] == (1 + 0.5 + 0 + 1) / 4
    assert found["results"]["win rate"]["n"] == 4
    assert found["prompts_too_long"] == 2


def test_answers_of_an_interrupted_step_are_kept(tmp_path: Path) -> None:
    """What a person has labelled is what is labelled further."""

    class Tired(Labeller):
        def __call__(self, comparisons, problems, workspace):
            raise KeyboardInterrupt

    step = compare(count=4)
    with pytest.raises(KeyboardInterrupt):
        Compare.execute(step.replace(labeller=Tired()), Workspace(tmp_path, tmp_path, PIPELINE))
    path = tmp_path / "answers.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "texts": [["a", "1", "b", "?"]] * 4}))
    step.execute(Workspace(tmp_path, tmp_path, PIPELINE))
    rows = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {(r["chosen"], r["rejected"]) for r in rows} == {("a", "1"), ("b", "?")}


def test_rounds_take_other_problems(tmp_path: Path) -> None:
    """Of three problems from number 0 one is odd; from number 1 two are."""
    for first, odd in ((0, 1), (1, 2)):
        folder = tmp_path / str(first)
        step = compare(problems=LongAtTimes(), count=3, first=first, completions=8)
        execute(Pipeline(name="p", steps=(step,)), folder)
        metrics = read_manifest(folder / "label-1")["metrics"]
        assert metrics["prompts_too_long"] == odd
        assert metrics["compared"] + metrics["same_or_empty"] == 3 * 4


def test_one_order_alone_is_that_of_the_judge() -> None:
    """The odds with the first answer in the first place come back from worth and bias."""
    for shown_first, shown_second in ((2.0, -3.0), (-1.0, 0.5), (60.0, -60.0), (-300.0, 300.0)):
        found = first_order(verdict(shown_first, shown_second, 2.0))
        if abs(shown_first) < 10:
            assert found == pytest.approx(shown_first / 2)
        assert (found > 0) == (shown_first > 0)


def test_pairs_of_people_are_asked_again(tmp_path: Path) -> None:
    """Agreement is with the labels, whichever answer is shown first; equal answers are left out."""
    rows = [
        {"prompt": f"p{i}", "chosen": "good" if i % 4 else "1", "rejected": "2"} for i in range(40)
    ]
    rows[0] = {"prompt": "p", "chosen": "same", "rejected": "same "}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = PairFiles(path=str(path), parts=LeakFreeSplit(validation=0, test=0))

    class Letters(Labeller):
        """Likes letters, and what stands first."""

        def __call__(self, comparisons, problems, workspace):
            liked = [c.first.isalpha() - c.second.isalpha() for c in comparisons]
            return [Verdict(0.5 + 0.3 * x, bias=5.0) for x in liked]

    step = Agreement(name="agreement", labeller=Letters(), pairs=pairs)
    execute(Pipeline(name="p", steps=(step,)), tmp_path / "run")
    metrics = read_manifest(tmp_path / "run" / "agreement")["metrics"]
    good = sum(r["chosen"] == "good" for r in rows)
    assert metrics["left_out"] == 1
    assert metrics["results"]["agreement"]["value"] == pytest.approx((good + (39 - good) / 2) / 39)
    one_order = metrics["results"]["agreement in one order"]["value"]
    assert 0.3 < one_order < 0.7  # whatever stands first
    few = step.replace(limit=5).execute(Workspace(tmp_path, tmp_path, PIPELINE))
    assert few["left_out"] == 1
    # Of the rows 1 to 4 the last is a tie.
    assert few["results"]["agreement"]["value"] == 3.5 / 4
    assert few["results"]["agreement"]["n"] == 4
    with pytest.raises(TreadleError, match="no pair has two different answers"):
        step.replace(limit=1).execute(Workspace(tmp_path, tmp_path, PIPELINE))
    with pytest.raises(TreadleError, match="pairs out of a file have no verifier"):
        step.replace(labeller=ByMarks()).execute(Workspace(tmp_path, tmp_path, PIPELINE))


def test_verifiers_tie_and_nothing_decided_is_an_error(tmp_path: Path) -> None:
    problems = IteratedLetters()
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()))
    pairs = [("ab", "1"), ("1", "ab"), ("a", "b")]
    comparisons = [Comparison(problems.problem(0), a, b) for a, b in pairs]
    verdicts = ByMarks()(comparisons, problems, workspace)
    assert [v.first_better for v in verdicts] == [1.0, 0.0, 0.5]
    flat = compare(problems=IteratedLetters(flat=True), count=4)
    with pytest.raises(TreadleError, match=r"label-1: none of \d+ comparisons was decided"):
        execute(Pipeline(name="p", steps=(flat,)), tmp_path / "flat")
    with pytest.raises(TreadleError, match="there are steps in pipelines alone"):
        PairsOf(step="label-1").resolve(None)
    for ask in (PairsOf(step="label-1").count, lambda: PairsOf(step="label-1").pair(0)):
        with pytest.raises(TreadleError, match=r"PairsOf\(step=label-1\): not resolved"):
            ask()
