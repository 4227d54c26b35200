"""Labelled solutions: planted errors, files, rollouts of each prefix, and what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.roll_out import MeasureSteps, RollOut, chosen
from treadle.alignment.solutions import (
    PlantedErrors,
    Solution,
    SolutionFiles,
    SolutionsOf,
    Steps,
)
from treadle.alignment.worked_solutions import worked_solution
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.request import Completion
from treadle.models.reward_head import RewardHead
from treadle.models.source import ModelSource, Opened
from treadle.objectives.process_reward import ProcessReward
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit
from treadle.train.precision import FP32
from treadle.train.run import Run, Trained

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class SteppingModel(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model().train(), folder)


class EndsWell(Problems):
    """Right is what says `good` in every line."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "", "good")

    def score(self, problem: Problem, completion: str) -> float:
        if completion.count("\n") == 4:
            raise ValueError("five lines")
        return float(all("good" in line for line in completion.splitlines()))


def gym() -> ReasoningGym:
    pytest.importorskip("reasoning_gym")
    return ReasoningGym(families=(Family(name="leg_counting"), Family(name="gcd")))


def test_planted_errors_are_where_they_are_said_to_be() -> None:
    planted = PlantedErrors(problems=gym(), amount=40)
    right = 0
    for index in range(planted.count()):
        true = worked_solution(planted.problems.problem(index)).split("\n")
        found = planted.solution(index)
        assert found == planted.solution(index)
        assert len(found.steps) == len(found.labels) == len(true)
        differ = [i for i, (a, b) in enumerate(zip(true, found.steps, strict=True)) if a != b]
        right += not differ
        wrong = differ[0] if differ else len(true)
        assert len(differ) <= 1
        assert found.labels == tuple(float(i < wrong) for i in range(len(true)))
    assert 10 < right < 30


def asks_for(first: list[list[str]], later: dict[str, list[str]]):
    """An engine that says what it is told to, and never draws by the same numbers again."""
    questions: set[int] = set()

    def done(text: str) -> Completion:
        return Completion(tokens=(1,), text=text, logprobs=(0.0,), finish="stop")

    def ask(thinker: Thinker, asks: list[Ask], sampling, n: int):
        rows = [later[a.prefix] if a.prefix else first[a.question] for a in asks]
        assert all(len(row) == n for row in rows)
        assert questions.isdisjoint(a.question for a in asks)
        questions.update(a.question for a in asks)
        assert len({a.question for a in asks}) == len(asks)
        return [[done(text) for text in row] for row in rows]

    return ask


def test_labels_are_shares_of_continuations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [["good 1\ngood 2", "good 1\nbad"], ["\n \n", "bad\n\ngood\ngood\ngood\ngood"]]
    later = {
        "good 1\n": ["good", "bad", "good", "good"],
        "bad\n": ["good"] * 4,
        "bad\ngood\n": ["good"] * 4,
        "bad\ngood\ngood\n": ["good"] * 4,
        "bad\ngood\ngood\ngood\n": ["good"] * 4,  # the verifier fails on these five lines
    }
    monkeypatch.setattr(Thinker, "ask", asks_for(first, later))
    step = RollOut(
        precision=FP32(),
        name="label",
        model=SteppingModel(),
        problems=EndsWell(),
        count=2,
        solutions=2,
    )
    execute(Pipeline(name="p", steps=(step,)), tmp_path)
    lines = (tmp_path / "label" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == [
        {"prompt": "q0", "completions": ["good 1", "good 2"], "labels": [0.75, 1.0]},
        {"prompt": "q0", "completions": ["good 1", "bad"], "labels": [0.75, 0.0]},
        {"prompt": "q1", "completions": ["bad", *["good"] * 4], "labels": [0.0] * 5},
    ]
    metrics = read_manifest(tmp_path / "label")["metrics"]
    assert (metrics["solutions"], metrics["unfinished"], metrics["steps"]) == (3, 1, 9)
    assert metrics["steps_right"] == pytest.approx(3 / 9)
    assert metrics["solutions_right"] == pytest.approx(1 / 3)
    assert metrics["verifications_failed"] == 5


def test_no_solution_that_ends_is_an_error(tmp_path: Path) -> None:
    step = RollOut(
        precision=FP32(),
        name="label",
        model=SteppingModel(),
        problems=EndsWell(),
        count=1,
        solutions=1,
    )
    step = step.replace(sampling=step.sampling.replace(max_tokens=2))
    with pytest.raises(
        TreadleError, match="label: none of 1 solutions came to its end in 2 tokens"
    ):
        execute(Pipeline(name="p", steps=(step,)), tmp_path)


def test_steps_are_learned(tmp_path: Path) -> None:
    """Which letter a step has decides whether it is right; new solutions are judged well."""
    rows = []
    for i in range(80):
        steps = [f"{'ab'[(i * 7 + j * 3) % 5 < 1]}{j}" for j in range(3)]
        labels = ["b" not in "".join(steps[: j + 1]) for j in range(3)]
        rows.append({"prompt": f"p{i // 4}", "completions": steps, "labels": labels})
    paths = [tmp_path / "train.jsonl", tmp_path / "new.jsonl"]
    for path, part in zip(paths, (rows[:60], rows[60:]), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in part))
    train = Run(
        name="reward",
        model=SteppingModel(),
        transforms=(RewardHead(),),
        source=Steps(solutions=SolutionFiles(path=str(paths[0])), per_step=16),
        objective=ProcessReward(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        fit=Fit(steps=40, precision=FP32()),
    )
    measure = MeasureSteps(
        name="measure",
        subject="reward",
        model=Trained(step="reward"),
        solutions=SolutionFiles(path=str(paths[1])),
        tokens=64,
        precision=FP32(),
    )
    execute(Pipeline(name="p", steps=(train, measure)), tmp_path / "run")
    metrics = read_manifest(tmp_path / "run" / "measure")["metrics"]
    assert metrics["results"]["steps"]["value"] > 0.9
    assert metrics["results"]["steps"]["n"] == 60
    assert metrics["results"]["best of 4"]["value"] > metrics["results"]["any one"]["value"]


def test_the_best_worst_step_is_chosen() -> None:
    rows = [
        Solution((user("a"),), ("x",), (1.0,)),
        Solution((user("a"),), ("y",), (0.0,)),
        Solution((user("b"),), ("x",), (0.0,)),
        Solution((user("c"),), ("x",), (0.0,)),
        Solution((user("c"),), ("y",), (1.0,)),
        Solution((user("c"),), ("z",), (0.0,)),
    ]
    found = chosen(rows, [0.5, -1.0, 9.0, 2.0, 1.0, 0.0])
    assert {k: v["value"] for k, v in found.items()} == pytest.approx(
        {"best of 3": 0.5, "any one": (1 / 2 + 1 / 3) / 2}
    )
    assert chosen(rows[:1], [0.0]) == {}
    # A model that tells nothing apart chooses no better than at random.
    found = chosen(rows, [0.0] * 6)
    assert found["best of 3"]["value"] == pytest.approx(found["any one"]["value"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "labels": []}, "row 1: it lacks `completions`"),
        ({"prompt": "p", "completions": ["a"], "labels": []}, "1 completions, but 0 labels"),
        ({"prompt": "p", "completions": "ab", "labels": [1, 1]}, "`prompt` is a text, the others"),
        ({"prompt": "p", "completions": ["a"], "labels": None}, "`prompt` is a text, the others"),
        ({"prompt": [], "completions": ["a"], "labels": [1]}, "`prompt` is a text, the others"),
        ({"prompt": "p", "completions": ["a"], "labels": [2]}, "true, false, or probabilities"),
        ({"prompt": "p", "completions": ["a"], "labels": ["x"]}, "true, false, or probabilities"),
    ],
)
def test_rows_that_are_no_solutions(row, message: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(FileFormatError, match=message):
        SolutionFiles(path=str(path)).count()


def test_bad_solutions_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "p", "completions": [], "labels": []},
        {"prompt": "p", "completions": ["a" * 200], "labels": [1]},
    ]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path)
    stream = Steps(solutions=SolutionFiles(path=str(path)), per_step=2).open(env)
    work = next(stream)
    assert work.metrics["solutions_left_out"] == 2.0
    assert work.batches[0].labels.tolist() == [1.0, 0.0] * 2
    named = json.loads((tmp_path / "left_out.json").read_text())
    assert named == {
        "1": "a solution has no step",
        "2": "it has 207 tokens, more than longest=128",
    }
    with pytest.raises(TreadleError, match="there are steps in pipelines alone"):
        SolutionsOf(step="label").resolve(None)
