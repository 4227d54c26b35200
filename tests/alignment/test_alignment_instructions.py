"""Instructions that a program checks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.verifiers import marks
from treadle.core.errors import TreadleError
from treadle.data.records import Problem, user


def checked(text: str, *rules: dict[str, Any]) -> float:
    return marks(Problem((user("?"),), json.dumps(rules), "instructions"), text)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"check": "words", "least": 2, "most": 3}, ("one two", "a b c"), ("one", "a b c d")),
        ({"check": "words", "most": 2}, ("", "a b"), ("a b c",)),
        ({"check": "sentences", "least": 2, "most": 2}, ("One. Two!",), ("One.", "1. 2. 3.", "x")),
        ({"check": "sentences", "least": 1, "most": 1}, ("It is 3.14 m.", "What?!"), ("A. B.",)),
        ({"check": "paragraphs", "least": 2}, ("a\n\nb", "a\n \nb"), ("a\nb", "a\n\n", "a\n\n ")),
        ({"check": "bullets", "least": 2, "most": 2}, ("- a\n- b", "x\n* a\n* b"), ("- a", "-a")),
        ({"check": "mentions", "text": "loom"}, ("A loom.", "LOOM"), ("bloom", "looms")),
        ({"check": "mentions", "text": "a", "least": 2}, ("a b a",), ("a",)),
        ({"check": "avoids", "text": "loom"}, ("bloom",), ("the Loom",)),
        ({"check": "begins", "text": "So"}, (" So it", "So"), ("it So", "so")),
        ({"check": "ends", "text": "end."}, ("the end. ",), ("end. no",)),
        ({"check": "case", "text": "lower"}, ("abc 1",), ("aBc", "1")),
        ({"check": "case", "text": "upper"}, ("ABC",), ("ABc",)),
        ({"check": "json"}, ('{"a": 1}', "3"), ("{a}", "")),
    ],
)  # fmt: skip
def test_checks(rule: dict[str, Any], good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    assert [checked(text, rule) for text in good] == [1.0] * len(good)
    assert [checked(text, rule) for text in bad] == [0.0] * len(bad)


def test_partial_credit_stays_below_half() -> None:
    rules = ({"check": "words", "most": 2}, {"check": "case", "text": "lower"})
    assert checked("a b", *rules) == 1.0
    assert checked("A b", *rules) == 0.25
    assert checked("A b c", *rules) == 0.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nothing", "no list of checks"),
        ("[]", "write at least one"),
        ('[{"check": "word"}]', "no check `word`.*words"),
        ('["words"]', "no check `None`"),
        ('[{"check": "words", "lest": 3}]', "has no `lest`.*least"),
        ('[{"check": "ends"}]', "needs a `text`"),
        ('[{"check": "case", "text": "title"}]', "lower and upper, not `title`"),
    ],
)
def test_wrong_checks_are_named(answer: str, message: str) -> None:
    with pytest.raises(TreadleError, match=message):
        marks(Problem((user("?"),), answer, "instructions"), "text")


def test_problems_say_what_is_checked_and_splits_share_no_question() -> None:
    train, held = FollowInstructions(rules=2), FollowInstructions(rules=2, held_out=True)
    questions = [[p.problem(i).prompt[0].content for i in range(200)] for p in (train, held)]
    assert not set(questions[0]) & set(questions[1])
    assert train.problem(7) == train.problem(7) != train.problem(8)
    for index in range(100):
        problem = train.problem(index)
        question = problem.prompt[0].content
        for rule in json.loads(problem.answer):
            match rule["check"]:
                case "words" | "sentences" | "bullets":
                    assert str(rule["most"]) in question
                case "case":
                    assert "small letters" in question
                case _:
                    assert rule["text"] in question
    one = next(
        p
        for i in range(99)
        if "small letters" in (p := FollowInstructions().problem(i)).prompt[0].content
    )
    assert FollowInstructions().score(one, "all small") == 1.0
