"""Problems of reasoning-gym: reproducible, split without overlap, with solutions that hold."""

from __future__ import annotations

import sys

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from treadle.alignment.gym import family_marks
from treadle.alignment.reasoning_gym import RANGE, Family, ReasoningGym, split_of
from treadle.alignment.verifiers import marks
from treadle.alignment.worked_solutions import WorkedSolutions, worked_solution
from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import TreadleError

SMALL = {
    "leg_counting": (("min_animals", 2), ("max_animals", 4)),
    "gcd": (("max_value", 100),),
    "chain_sum": (("min_terms", 3), ("max_terms", 4), ("max_digits", 2)),
    "spell_backward": (("min_word_len", 3), ("max_word_len", 6)),
    "simple_geometry": (),
    "prime_factorization": (("min_value", 10), ("max_value", 300)),
}
WITHOUT_FULL_MARKS = {
    "boxnet",
    "composite",
    "graph_color",
    "propositional_logic",
    "rubiks_cube",
    "rush_hour",
}
"""Families whose stored answer is no answer; `composite` is made of others."""


def gym(*names: str, **fields: object) -> ReasoningGym:
    families = tuple(Family(name=name, settings=SMALL.get(name, ())) for name in names)
    return ReasoningGym(families=families).replace(**fields)


def texts(problems: ReasoningGym, count: int) -> list[str]:
    return [problems.problem(i).prompt[0].content for i in range(count)]


def test_problems_are_the_librarys_own() -> None:
    for name, settings in SMALL.items():
        problem = gym(name).problem(5)
        question = problem.metadata["question"]
        assert problem.prompt[0].content.startswith(question.strip())
        index = problem.metadata["source_index"]
        source = create_dataset(name, seed=1, size=1, **dict(settings))
        entry = {"question": question, "answer": problem.answer, "metadata": problem.metadata}
        assert source.score_answer(problem.answer, entry) == 1.0
        assert problem.verifier == f"reasoning-gym/{name}"
        assert 0 <= index < RANGE


def test_a_problem_depends_on_its_index_alone() -> None:
    problems = gym("leg_counting", "gcd")
    backwards = [problems.problem(i).prompt[0].content for i in reversed(range(20))]
    assert texts(problems, 20) == backwards[::-1]
    assert texts(problems, 20) != texts(problems.replace(seed=1), 20)
    # The families in turn.
    assert [problems.problem(i).verifier for i in range(4)] == [
        "reasoning-gym/leg_counting",
        "reasoning-gym/gcd",
    ] * 2


def test_past_the_first_block_of_items() -> None:
    problems = gym("gcd")
    assert len(set(texts(problems, 70))) > 60
    assert problems.problem(100_000) == problems.problem(100_000)


@pytest.mark.parametrize("name", SMALL)
def test_no_held_out_question_is_ever_trained_on(name: str) -> None:
    """Also under another seed, and in families with few different questions."""
    training = set(texts(gym(name), 400)) | set(texts(gym(name, seed=3), 400))
    held_out = set(texts(gym(name, split="heldout"), 100))
    assert len(held_out) > 20
    assert not training & held_out


def test_the_split_is_by_words() -> None:
    assert split_of("a  b\nc ") == split_of("a b c")
    share = sum(split_of(f"question {i}") == "heldout" for i in range(4000)) / 4000
    assert 0.10 < share < 0.15


def test_families_that_cannot_fill_a_split_are_named() -> None:
    """One question is on one side; the other has none."""
    only = Family(name="prime_factorization", settings=(("min_value", 97), ("max_value", 97)))
    problems = ReasoningGym(families=(only,))
    question = create_dataset("prime_factorization", min_value=97, max_value=97)[0]["question"]
    full = split_of(question)
    empty = "train" if full == "heldout" else "heldout"
    assert problems.replace(split=full).problem(3).answer == "97"
    with pytest.raises(TreadleError, match=f"none for the split `{empty}`: .* widen its settings"):
        problems.replace(split=empty).problem(0)


def test_mistakes_are_named() -> None:
    for settings, message in (
        ((("max_animal", 3),), "`leg_counting` has no setting `max_animal`; did you mean"),
        ((("max_animals", 1),), "does not accept max_animals=1: max_animals must be >="),
        ((("seed", 1),), "has no setting `seed`"),
    ):
        family = Family(name="leg_counting", settings=settings)
        with pytest.raises(TreadleError, match=message):
            ReasoningGym(families=(family,)).problem(0)


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    family = Family(name="gcd", settings=(("max_value", 77),))
    with pytest.raises(TreadleError, match=r"pip install 'treadle\[tasks\]'"):
        ReasoningGym(families=(family,)).problem(0)


@pytest.mark.parametrize("name", SMALL)
def test_every_worked_solution_is_accepted(name: str) -> None:
    solutions = WorkedSolutions(problems=gym(name), amount=300)
    assert solutions.count() == 300
    for index in range(300):
        question, solution = solutions.conversation(index).messages
        assert (question.role, solution.role) == ("user", "assistant")
        problem = solutions.problems.problem(index)
        assert marks(problem, solution.content) == 1.0
        steps = solution.content.splitlines()
        assert len(steps) > 1 or name in ("gcd", "prime_factorization")
        for step in steps[:-1]:
            check(step)


def check(step: str) -> None:
    """Each equation of a line holds, by Python's own arithmetic."""
    for equation in step.split(": ")[-1].split(", "):
        left, equals, right = equation.partition(" = ")
        if equals:
            left, right = (side.replace("×", "*") for side in (left, right))
            assert eval(left) == eval(right), step  # noqa: S307


def test_solutions_are_configurations() -> None:
    solutions = WorkedSolutions(problems=gym("gcd", "leg_counting"), amount=7)
    assert from_yaml(to_yaml(solutions), expect=WorkedSolutions) == solutions


def test_families_without_solutions_are_named() -> None:
    with pytest.raises(TreadleError, match="no worked solutions for the family `lcm`"):
        worked_solution(gym("lcm").problem(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - WITHOUT_FULL_MARKS))
def test_stored_answers_have_full_marks(name: str) -> None:
    """In every family, found in the text after `Answer:` and in tags."""
    problem = gym(name, split="heldout").problem(0)
    assert family_marks(name, problem, problem.answer) == 1.0
    assert marks(problem, f"So it is.\nAnswer: {problem.answer}") == 1.0
    assert marks(problem, f"<answer>\n{problem.answer}\n</answer>") == 1.0
