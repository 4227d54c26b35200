"""Prompt search: which candidates go on, what is proposed, and a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.config import parse
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.problems import Problems
from treadle.data.rating import Scored
from treadle.data.records import Problem, user
from treadle.evals.evaluate import Exam
from treadle.evals.prompt_search import (
    PROMPTS,
    Induced,
    OwnShots,
    Rate,
    SearchPrompts,
    halving,
    stated,
)
from treadle.inference.engine import Engine
from treadle.inference.reasoning.prompting import (
    FewShot,
    Instructed,
    OneAnswer,
    Prompt,
    Shot,
    ZeroShot,
)
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def named(*names: str) -> list[Prompt]:
    return [Instructed(instruction=name) for name in names]


def rating(worth: dict[str, float], asked: list[tuple[list[str], range]]) -> Rate:
    def rate(prompts, numbers):
        names = [p.instruction for p in prompts]
        asked.append((names, numbers))
        return [[worth[name]] * len(numbers) for name in names]

    return rate


def test_halving_keeps_the_better_half() -> None:
    """Five, three, two; each round on fresh problems, twice as many."""
    worth = {"a": 0.1, "b": 0.5, "c": 0.4, "d": 0.9, "e": 0.0}
    asked: list[tuple[list[str], range]] = []
    tried = halving(named(*worth), rating(worth, asked), first=4, begin=10)
    assert asked == [
        (["a", "b", "c", "d", "e"], range(10, 14)),
        (["d", "b", "c"], range(14, 22)),
        (["d", "b"], range(22, 38)),
    ]
    found = [(t.prompt.instruction, t.rounds, len(t.scores)) for t in tried]
    assert found == [("d", 3, 28), ("b", 3, 28), ("c", 2, 12), ("a", 1, 4), ("e", 1, 4)]
    assert tried[0].mean == pytest.approx(0.9)


def test_alike_means_the_first_and_means_are_over_all_rounds() -> None:
    asked: list[tuple[list[str], range]] = []
    (first, _) = halving(named("x", "y"), rating({"x": 0.5, "y": 0.5}, asked), first=2)
    assert first.prompt.instruction == "x"
    assert len(asked) == 1
    (alone,) = halving(named("x"), rating({"x": 0.5}, asked), first=3)
    assert alone.scores == [0.5] * 3

    def rate(prompts, numbers):
        """`b` is far better at first, `a` a little better later; `c` is soon out, and its mean
        stays what it was."""
        early = {"a": 0.5, "b": 1.0, "c": 0.49, "d": 0.0}
        late = {"a": 0.3, "b": 0.2}
        return [[(late if numbers.start else early)[p.instruction]] * len(numbers) for p in prompts]

    tried = halving(named("a", "b", "c", "d"), rate, first=2)
    assert [t.prompt.instruction for t in tried] == ["b", "a", "c", "d"]
    assert [t.mean for t in tried] == pytest.approx([2.8 / 6, 2.2 / 6, 0.49, 0.0])


class Doubles(Problems):
    """Right is the letter, twice."""

    def problem(self, index: int) -> Problem:
        letter = "abcdefghij"[index % 10]
        return Problem((user(f"twice {letter}?"),), letter * 2, "any")

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.strip() == problem.answer)


def thinker() -> Thinker:
    return Thinker(
        Engine(tiny_model(), byte_tokenizer().with_template(TEMPLATE)), lambda text: text
    )


def said(text: str) -> Completion:
    return Completion(tokens=(1,), text=text, logprobs=(0.0,), finish="stop")


def test_instructions_are_read_off_solved_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Ask] = []
    answers = iter(['"Say it\n twice."', "Say it twice.", " ", "<think>hm</think>Double it."])

    def ask(self: Thinker, asks: list[Ask], sampling: Sampling, n: int = 1):
        asked.extend(asks)
        return [[said(next(answers))] for _ in asks]

    monkeypatch.setattr(Thinker, "ask", ask)
    problems = [Doubles().problem(i) for i in range(5)]
    found = Induced(count=4, shown=2)(
        thinker(), problems, lambda p, t: Scored(Doubles().score(p, t))
    )
    assert found == named("Say it twice.", "Double it.")
    assert len({a.turns[0]["content"] for a in asked}) > 1, "different examples for each"
    for one in asked:
        text = one.turns[0]["content"]
        assert sum(f"{p.prompt[0].content}\n{p.answer}\n" in text for p in problems) == 2


def test_what_answers_are_checked_by_is_shown_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stated answer is none, the model's own right ones are; where there are none,
    nothing is proposed."""
    problems = [Problem((user(f"about {i}"),), '[{"check": "case"}]', "any") for i in range(3)]
    asked: list[Ask] = []

    def ask(self: Thinker, asks: list[Ask], sampling: Sampling, n: int = 1):
        asked.extend(asks)
        return [[said("fine"), said("bad")][:n] for _ in asks]

    monkeypatch.setattr(Thinker, "ask", ask)
    found = Induced(count=2, shown=3, tries=2)(
        thinker(), problems, lambda p, t: Scored(float(t == "fine"))
    )
    assert found == named("fine")
    shown = asked[-1].turns[0]["content"]
    assert shown.count("\nfine\n") == 3
    assert "check" not in shown
    assert Induced()(thinker(), problems, lambda p, t: Scored(0.0)) == []
    prefixed = stated(problems[:1], lambda p, t: Scored(float(t.startswith("Answer: "))))
    assert prefixed == [Shot(question="about 0", answer='Answer: [{"check": "case"}]')]


def test_shots_are_the_models_own_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest right one of each problem; none where nothing was right."""
    problems = [Doubles().problem(i) for i in range(4)]
    rows = [["aa", "x"], ["y", "z"], ["cc surely", " cc "], ["", "<think>dd</think>dd"]]

    def ask(self: Thinker, asks: list[Ask], sampling: Sampling, n: int = 1):
        return [[said(t) for t in rows[a.question]] for a in asks]

    monkeypatch.setattr(Thinker, "ask", ask)

    def score(problem: Problem, text: str) -> Scored:
        return Scored(float(text.startswith(problem.answer)))

    found = OwnShots(count=6, shots=2, tries=2)(thinker(), problems, score)
    right = {("twice a?", "aa"), ("twice c?", "cc"), ("twice d?", "dd")}
    assert len(found) == len(set(found)) > 1
    for prompt in found:
        assert len(prompt.shots) == 2
        assert {(s.question, s.answer) for s in prompt.shots} < right
    assert OwnShots()(thinker(), problems[1:2], score) == []


def test_an_instruction_stands_before_the_question() -> None:
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    put, begun = Instructed(instruction="Do it.")(turns)
    assert [t["content"] for t in put] == ["s", "Do it.\n\nq"]
    assert begun == ""


class WritingBytes(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(context=400), folder)


class Odd(Problems):
    """Right is what sums to an odd number: half of all answers are."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "", "any")

    def score(self, problem: Problem, completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)


def test_a_search_from_end_to_end(tmp_path: Path) -> None:
    """What is found is the best of what was tried, and what an exam is sat with."""
    short = Sampling(temperature=0.0, max_tokens=4)
    step = SearchPrompts(
        name="search",
        model=WritingBytes(),
        problems=Odd(),
        exam=Exam(name="held out", problems=Odd(), count=6, first=1000),
        candidates=(ZeroShot(), FewShot(shots=(Shot(question="q", answer="a"),))),
        proposers=(Induced(count=3, sampling=Sampling(max_tokens=5)),),
        first=3,
        sampling=short,
        precision=FP32(),
    )
    execute(Pipeline(name="p", steps=(step,)), tmp_path)
    metrics = read_manifest(tmp_path / "search")["metrics"]
    tried = json.loads((tmp_path / "search" / PROMPTS).read_text())
    assert len(tried) == metrics["tried"] == 2 + metrics["proposed"]
    assert json.loads(metrics["best"]) == tried[0]["prompt"]
    best = parse(tried[0]["prompt"], expect=Prompt, where=lambda path: "prompts.json")
    assert tried[0]["rounds"] == max(row["rounds"] for row in tried)
    assert metrics["tokens_spent"] > 0
    rows = metrics["rows"]
    assert len(rows) == (1 if best == ZeroShot() else 2)
    assert {row["exam"] for row in rows} == {"held out"}
    engine = Engine(tiny_model(context=400), byte_tokenizer().with_template(TEMPLATE))

    def share(prompt: Prompt, numbers: range) -> float:
        thoughts = OneAnswer(prompt=prompt, sampling=short)(
            Thinker(engine, lambda text: text),
            [({"role": "user", "content": f"q{i}"},) for i in numbers],
        )
        return sum(Odd().score(Odd().problem(0), t.text) for t in thoughts) / len(numbers)

    assert rows[-1]["accuracy"]["value"] == pytest.approx(share(best, range(1000, 1006)))
    for row in tried:
        prompt = parse(row["prompt"], expect=Prompt, where=lambda path: PROMPTS)
        assert row["mean"] == pytest.approx(share(prompt, range(16, 16 + row["problems"])))
    assert len({row["mean"] for row in tried}) > 1
