"""Answers found in text, verified by reasoning-gym's own scoring, and rewards made of it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.rewards import AnswerMarked, Graded, Part, Unmarked, Verified, Weighted
from treadle.alignment.verifiers import extract_answer, marks, parse_number
from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import ConfigError, TreadleError
from treadle.data.rating import Scored
from treadle.data.records import Problem, user
from treadle.data.source import Env


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 1 = 2\nAnswer: 2", "2"),
        ("Answer: 2.", "2"),
        ("Answer: 2.50", "2.50"),
        ("answer :  2  \nThat was easy.", "2"),
        ("Answer:\n\n2\n", "2"),
        ("**Answer:** **2**", "2"),
        ("**Answer**: `two words.`", "two words."),
        ("The final answer is: $2$", "2"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        ("<answer>2</answer> is what I say. Answer: 3", "2"),
        ("<answer>\n1 0\n0 1\n</answer>", "1 0\n0 1"),
        ("<ANSWER> 2 </ANSWER>", "2"),
        ("<answer>2", "2"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("Answer: _ Q _", "_ Q _"),
        ("Answer:", None),
        ("Answer: **", None),
        ("It is 2.", None),
        ("The answers: 2", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_answers_of_several_lines() -> None:
    text = "Answer: 1 2\n3 4\nand so on"
    assert extract_answer(text, lines=2) == "1 2\n3 4"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", Decimal("1234.5")),
        ("$5", Decimal(5)),
        ("-3", Decimal(-3)),
        ("40%", Decimal(40)),
        ("5 ducks", None),
        ("", None),
        ("1.2.3", None),
    ],
)
def test_numbers(text: str, number: Decimal | None) -> None:
    assert parse_number(text) == number


def problem(verifier: str, answer: str = "1200") -> Problem:
    return Problem((user("How many?"),), answer, verifier)


def test_number_and_exact() -> None:
    assert marks(problem("number"), "Answer: $1,200.00") == 1.0
    assert marks(problem("number"), "Answer: 1201") == 0.0
    assert marks(problem("number"), "Answer: 1200 or 1300") == 0.0
    assert marks(problem("exact"), "Answer: 1200") == 1.0
    assert marks(problem("exact"), "Answer: 1,200") == 0.0
    assert marks(problem("exact"), "1200") == 0.0


def test_unknown_verifiers_are_named() -> None:
    with pytest.raises(TreadleError, match="no verifier `nunber`; did you mean `number`"):
        marks(problem("nunber"), "Answer: 1")
    with pytest.raises(TreadleError, match="no family `leg_countin`; did you mean `leg_counting`"):
        marks(problem("reasoning-gym/leg_countin"), "Answer: 1")


def spelling() -> Problem:
    family = Family(name="spell_backward", settings=(("min_word_len", 8), ("max_word_len", 8)))
    return ReasoningGym(families=(family,)).problem(0)


def test_partial_credit_is_graded_but_not_verified() -> None:
    asked = spelling()
    nearly = f"Answer: {asked.answer[:-1]}-"
    assert Graded()(asked, nearly) == pytest.approx(7 / 8)
    assert Verified()(asked, nearly) == 0.0
    assert Verified()(asked, f"Answer: {asked.answer}") == Graded()(
        asked, "Answer: " + asked.answer
    )
    assert Verified()(asked, asked.answer) == 0.0


def test_weighted_rewards() -> None:
    reward = Weighted(
        parts=(
            Part(name="correct", reward=Verified(), weight=3.0),
            Part(name="marked", reward=AnswerMarked(), weight=1.0),
        )
    )
    asked = spelling()
    rate = reward.open(Env(tiny_model(), byte_tokenizer(), Path("nowhere")), 1.0)
    right, wrong, none = rate(asked, [f"Answer: {asked.answer}", "Answer: wrong", "I give up"])
    assert (right.value, none.value) == (1.0, 0.0)
    assert wrong == Scored(0.25, {"correct": 0.0, "marked": 1.0})
    assert [Unmarked()(asked, said) for said in ("Answer: wrong", "I give up")] == [0.0, 1.0]
    assert from_yaml(to_yaml(reward), expect=Weighted) == reward


def test_parts_have_names_of_their_own() -> None:
    part = Part(name="correct", reward=Verified())
    with pytest.raises(ValueError, match="two parts are called `correct`: rename one"):
        Weighted(parts=(part, part))
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        from_yaml("kind: Part\nname: x\nreward: {kind: Verified}\nweight: -0.1", expect=Part)


def test_problems_score_by_their_reward() -> None:
    reward = Weighted(parts=(Part(name="marked", reward=AnswerMarked()),))
    gym = ReasoningGym(families=(Family(name="leg_counting"),), reward=reward)
    assert gym.score(gym.problem(0), "Answer: wrong") == 1.0
