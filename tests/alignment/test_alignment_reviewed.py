"""Lessons from a model's own answers: what is learned of them, and what is only read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from low_problems import Low, model_that_ends, said
from tiny_generation import END, byte_tokenizer

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.reviewed import (
    LearnCritique,
    LearnVerdict,
    Reviewed,
    ReviewedStream,
    first_mistake,
)
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.worked_solutions import worked_solution
from treadle.core.errors import TreadleError
from treadle.data.rating import guarded
from treadle.data.records import Problem, assistant, user
from treadle.data.source import Env
from treadle.inference.engine import Engine
from treadle.inference.reasoning.critique import CritiqueAndRefine
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.reasoning.verdict import ASK, ByVerdict
from treadle.inference.request import Completion
from treadle.models.decoder import DecoderModel
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
GROUPS = [["low", "\u00ff", "low", "low again"], ["\u00fe", "<think>ab</think>c", "\u00fd", " "]]


def env(model: DecoderModel, folder: Path) -> Env:
    return Env(model=model, tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=folder)


def stream(tmp_path: Path, groups: list[list[str]], **changes) -> ReviewedStream:
    rollouts = Rollouts(problems=Low(), prompts=2, completions=4)
    usual = {"lesson": LearnVerdict(), "per_step": 4, "answers": False}
    config = Reviewed(rollouts=rollouts, **{**usual, **changes})
    made = config.open(env(model_that_ends(), tmp_path))
    made.rollouts.sample = lambda requests: [said(group) for group in groups]
    return made


def learned(work) -> list[tuple[str, str]]:
    """Of each conversation what is read and what is learned."""
    found, tokenizer = [], byte_tokenizer()
    for batch in work.batches:
        for i in range(batch.sequence_count):
            span = list(batch.layout.span(i))
            targets = set(batch.sources[batch.sequences == i].tolist())
            parts: tuple[list[int], list[int]] = ([], [])
            for place in span:
                token = int(batch.tokens[place])
                parts[place - 1 in targets].extend([] if token == END else [token])
            found.append((tokenizer.decode(parts[0]), tokenizer.decode(parts[1]).strip()))
    return found


def test_verdicts_are_the_verifiers(tmp_path: Path) -> None:
    """As many right as wrong ones, each text once; the attempt itself is not learned."""
    made = stream(tmp_path, GROUPS)
    work = next(made)
    found = learned(work)
    assert [word for _, word in found] == ["Yes.", "No."] * 2
    for text, word in found:
        question, attempt, ask = text.split("\n")[:3]
        assert question.startswith("u:q")
        assert ask == f"u:{ASK}"
        right = Low().score(Low().problem(0), attempt.removeprefix("a:"))
        assert word == ("Yes." if right else "No.")
    assert work.metrics["right_answers"] == work.metrics["wrong_answers"] == 3
    assert len(made.waiting) == 2
    again = stream(tmp_path, GROUPS)
    again.restore(made.state())
    assert learned(next(again)) == learned(next(made))


def test_right_answers_are_learned_beside_verdicts(tmp_path: Path) -> None:
    """Else the model would forget how to solve; wrong ones are never learned."""
    found = learned(next(stream(tmp_path, GROUPS, answers=True, per_step=9)))
    solved = [(text, word) for text, word in found if word not in ("Yes.", "No.")]
    assert len(solved) == [word for _, word in found].count("Yes.") == 3
    for text, word in solved:
        assert text.startswith("u:q")
        assert "?" not in text.split("\n")[1], "no question but the problem's"
        assert Low().score(Low().problem(0), word) == 1.0


def test_all_answers_without_balance(tmp_path: Path) -> None:
    right = [["low", "a"], ["b", "c"]]
    with pytest.raises(TreadleError, match="gave only right or only wrong answers"):
        next(stream(tmp_path, right))
    work = next(stream(tmp_path, right, balance=False))
    assert [word for _, word in learned(work)] == ["Yes."] * 4


class Unsure(Low):
    """Its verifier fails for what begins with a bang."""

    def score(self, problem: Problem, completion: str) -> float:
        if completion.startswith("!"):
            raise ValueError("who knows")
        return super().score(problem, completion)


def test_what_nobody_could_verify_teaches_nothing(tmp_path: Path) -> None:
    groups = [["low", "!", "!!", "\u00ff"], ["low", "!", "\u00fe", "\u00fd"]]
    made = stream(tmp_path, groups, balance=False)
    made.rollouts.rate = guarded(Unsure().score, 1.0)
    work = next(made)
    assert not any("!" in text for text, _ in learned(work) + learned(next(made)))
    assert (work.metrics["right_answers"], work.metrics["wrong_answers"]) == (2, 3)
    assert work.metrics["reward"] == 2 / 8


def test_lessons_longer_than_the_context_are_counted(tmp_path: Path) -> None:
    long = "low" * 30
    work = next(stream(tmp_path, [[long, "low", "a", "b"], [long, "c", "d", "e"]], balance=False))
    assert work.metrics["lessons_too_long"] == 2
    assert not any(long in text for text, _ in learned(work))
    with pytest.raises(TreadleError, match="or lessons longer than the context"):
        next(stream(tmp_path, [[long] * 4] * 2, balance=False))


def test_an_attempt_that_shows_nothing_is_no_lesson(tmp_path: Path) -> None:
    groups = [["low", "<think>a</think>", "\u00ff", "<think>b"]] * 2
    found = learned(next(stream(tmp_path, groups, balance=False)))
    assert [text.split("\n")[1] for text, _ in found] == ["a:low", "a:\u00ff"] * 2


def test_ranks_share_a_step_of_lessons(tmp_path: Path) -> None:
    alone = stream(tmp_path, GROUPS, per_step=4)
    made = alone.config.open(replace(alone.env, world=2, rank=1))
    made.rollouts.sample = alone.rollouts.sample
    made.rollouts.share = 2
    assert len(learned(next(made))) == 2
    none = alone.config.open(replace(alone.env, world=2, rank=1))
    none.rollouts.sample = lambda requests: [said(["low"] * 4)] * len(requests)
    work = next(none)  # another may have a lesson
    assert work.batches == ()
    assert work.spare is not None
    assert work.spare.sequence_count == 1
    odd = alone.config.replace(rollouts=Rollouts(problems=Low(), prompts=3))
    with pytest.raises(TreadleError, match="per_step=4 cannot be shared by 3 processes"):
        odd.open(replace(alone.env, world=3))


GCD = ReasoningGym(families=(Family(name="gcd", settings=(("max_value", 100),)),))


def test_critiques_name_the_first_mistake() -> None:
    pytest.importorskip("reasoning_gym")
    problem, strategy = GCD.problem(0), CritiqueAndRefine()
    solution = worked_solution(problem)
    lines = solution.splitlines()
    assert len(lines) > 2
    wrong = "\n".join([lines[0], "1 = 2", *lines[2:]])
    critique, refined = LearnCritique()(problem, wrong, right=False)
    first = (*problem.prompt, assistant(wrong), user(strategy.critique))
    found = assistant(f"Line 2 is wrong: 1 = 2\nRight is: {lines[1]}")
    assert critique.messages == (*first, found)
    assert refined.messages == (*first, found, user(strategy.refine), assistant(solution))
    # Of what nobody sees nothing is said.
    thought = f"<think>\nhm\n</think>\n{wrong}"
    assert LearnCritique()(problem, thought, right=False) == (critique, refined)
    (praise,) = LearnCritique()(problem, solution, right=True)
    assert praise.messages[-1] == assistant("No mistakes.")
    assert strategy.content in praise.messages[-1].content.lower(), "which ends the rounds"


def test_where_a_text_leaves_another() -> None:
    right = "a = 1\nb = 2\nAnswer: 2"
    assert first_mistake("a = 1", right) == "Line 2 is missing: b = 2"
    assert first_mistake(f"{right}\nc", right) == "Line 4 is too much: c"
    assert first_mistake(f"  {right}\n\n", right).startswith("The steps are right")


def test_a_model_learns_to_tell(tmp_path: Path) -> None:
    """What begins low is right: a tiny model comes to say so of answers that it has not seen."""
    model, plan = model_that_ends(), SingleProcess()
    rollouts = Rollouts(problems=Low(), prompts=8, completions=8)
    world, random = env(model, tmp_path), Random(0)
    made = Reviewed(
        rollouts=rollouts, lesson=LearnVerdict(ask="?"), per_step=16, answers=False
    ).open(world)

    def attempts(requests: object) -> list[list[Completion]]:
        """Not the model's own: it would soon answer every question as it answers `ask`."""
        texts = [random.choice("ab\u00fe\u00ff") + random.choice("xyz") for _ in range(64)]
        return [said(texts[i : i + 8]) for i in range(0, 64, 8)]

    made.rollouts.sample = attempts
    fit(
        model,
        made,
        CausalLM(),
        optimizer=AdamW(lr=5e-3),
        schedule=Constant(),
        config=Fit(steps=200, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=tmp_path / "checkpoints",
    )
    thinker = Thinker(Engine(model, world.tokenizer), lambda text: text)
    texts = ["ax", "bz", "ay", "\u00fex", "\u00ffz", "\u00ffy"]
    turns = ({"role": "user", "content": "q3"},)
    scores = torch.tensor(ByVerdict(ask="?")(thinker, Ask(0, turns), texts, []))
    assert scores[:3].mean() > scores[3:].mean() + 0.5
