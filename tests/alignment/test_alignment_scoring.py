"""Scoring: what a verifier may do wrong, and what is counted of it."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.rewards import (
    ArithmeticMean,
    Combination,
    GeometricMean,
    Part,
    Reward,
    UncertaintyWeighted,
    Weighted,
    WorstOf,
)
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.rating import (
    OvertimeError,
    Scored,
    require_sound,
    reward_metrics,
    scorer,
    time_limit,
)
from treadle.data.records import Problem, user
from treadle.data.source import Env

PROBLEM = Problem((user("?"),), "", "any")
NOWHERE = Env(tiny_model(), byte_tokenizer(), Path("nowhere"))


def hang() -> float:
    """Whatever is raised, it goes on."""
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            continue


def crash() -> float:
    raise ZeroDivisionError("x" * 999)


class Marks(Problems):
    """Gives what the completion names."""

    def problem(self, index: int) -> Problem:
        return PROBLEM

    def score(self, problem: Problem, completion: str) -> float:
        given: dict[str, Callable[[], object]] = {
            "half": lambda: 0.5,
            "whole": lambda: 1,
            "nothing": lambda: None,
            "text": lambda: "1",
            "nan": lambda: float("nan"),
            "endless": lambda: float("inf"),
            "hang": hang,
            "crash": crash,
            "leave": lambda: sys.exit("wrong"),
        }
        return given[completion]()  # type: ignore[return-value]


class MarksOf(Reward):
    """Of another completion than the one that is scored."""

    said: str = ""

    def __call__(self, problem: Problem, completion: str) -> float:
        return Marks().score(problem, self.said or completion)


@pytest.mark.parametrize(
    ("said", "value", "failure"),
    [
        ("half", 0.5, ""),
        ("whole", 1.0, ""),
        ("nothing", 0.0, "TypeError: must be real number, not NoneType"),
        ("text", 0.0, "TypeError: must be real number, not str"),
        ("nan", 0.0, "the reward was nan"),
        ("endless", 0.0, "the reward was inf"),
        ("hang", 0.0, "OvertimeError: no answer within 0.1 s"),
        ("crash", 0.0, f"ZeroDivisionError: {'x' * 181}"),
        ("leave", 0.0, "SystemExit: wrong"),
        ("unheard of", 0.0, "KeyError: 'unheard of'"),
    ],
)
@pytest.mark.parametrize("reward", [None, MarksOf()])
def test_whatever_a_verifier_does_there_is_a_score(
    reward: Reward | None, said: str, value: float, failure: str
) -> None:
    """Of the verifier of problems, for one answer at a time, and of a reward, for several."""
    expected = Scored(value, failure=failure)
    if reward is None:
        assert scorer(Marks(), 0.1)(PROBLEM, said) == expected
    else:
        assert reward.open(NOWHERE, 0.1)(PROBLEM, ["whole", said]) == [Scored(1.0), expected]


def test_what_is_no_reward_is_not_hidden_among_others() -> None:
    """The least of 1 and what is no number would be 1."""
    parts = (Part(name="fine", reward=MarksOf(said="whole")), Part(name="odd", reward=MarksOf()))
    weigh = Weighted(parts=parts, together=WorstOf()).open(NOWHERE, 1.0)
    assert weigh(PROBLEM, ["half", "nan", "whole"]) == [
        Scored(0.5, {"fine": 1, "odd": 0.5}),
        Scored(0.0, failure="`odd`: the reward was nan"),
        Scored(1.0, {"fine": 1, "odd": 1}),
    ]


@pytest.mark.parametrize("together", [ArithmeticMean(), GeometricMean(), WorstOf()])
def test_what_is_watched_does_not_count(together: Combination) -> None:
    parts = (
        Part(name="learned", reward=MarksOf(said="half")),
        Part(name="watched", reward=MarksOf(), weight=0.0),
    )
    rate = Weighted(parts=parts, together=together).open(NOWHERE, 1.0)
    (found,) = rate(PROBLEM, ["whole"])
    assert found == Scored(0.5, {"learned": 0.5, "watched": 1.0})
    hidden = rate(PROBLEM, ["whole", "crash", "nan"])
    assert [s.value for s in hidden] == [0.5] * 3, "its failures cost nothing"
    assert not any(s.failure for s in hidden)
    assert reward_metrics(hidden) == {
        "rewards_failed": 0.0,
        "reward_learned": 0.5,
        "reward_watched": 1.0,
        "reward_watched_failed": 2.0,
    }
    with pytest.raises(ValueError, match="no part has a weight: nothing would be learned"):
        Weighted(parts=parts[1:])


class Nothing(Combination):
    """Makes no number of its parts."""

    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        return math.nan


def test_parts_that_make_no_number_together_are_counted() -> None:
    parts = (Part(name="fine", reward=MarksOf()),)
    (found,) = Weighted(parts=parts, together=Nothing()).open(NOWHERE, 1.0)(PROBLEM, ["whole"])
    assert found == Scored(0.0, failure="the rewards together were nan")


def test_doubt_costs_where_rewards_differ() -> None:
    """The mean less its share of the variance, both weighted, and never below 0."""
    doubted = UncertaintyWeighted(doubt=2.0)
    assert doubted([0.8, 0.8, 0.8], [1, 2, 3]) == pytest.approx(0.8)
    rewards, weights = np.array([0.9, 0.5, 0.6]), np.array([1.0, 1.0, 2.0])
    mean = np.average(rewards, weights=weights)
    spread = np.average((rewards - mean) ** 2, weights=weights)
    assert doubted(list(rewards), list(weights)) == pytest.approx(mean - 2 * spread)
    assert UncertaintyWeighted(doubt=9.0)([0.0, 1.0], [1, 1]) == 0.0


def test_a_misconfigured_verifier_ends_the_run() -> None:
    class Wrong(Marks):
        def score(self, problem: Problem, completion: str) -> float:
            raise TreadleError("the problem has no tests")

    with pytest.raises(TreadleError, match="has no tests"):
        scorer(Wrong(), 1.0)(PROBLEM, "half")


def test_time_limits_leave_nothing_behind() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(OvertimeError, match=r"no answer within 0\.05 s"), time_limit(0.05):
            time.sleep(5)
        with time_limit(0.05):
            pass
        time.sleep(0.1)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.raise_signal(signal.SIGALRM)
        assert seen == [signal.SIGALRM], "the handler of before"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_are_not_limited() -> None:
    """A signal reaches the main thread alone."""
    found: list[Scored] = []

    def score() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        found.append(scorer(Marks(), 0.01)(PROBLEM, "half"))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert found == [Scored(0.5)]


def test_means_are_of_what_was_scored() -> None:
    scores = [
        Scored(0.5, {"a": 1.0, "b": 0.0}),
        Scored(1.0, {"a": 0.5}),
        Scored(0.0, failure="oops"),
    ]
    assert reward_metrics(scores[::2]) == {"reward_a": 1.0, "reward_b": 0.0, "rewards_failed": 1.0}
    assert reward_metrics([Scored(1.0, {"a": 0.25}), scores[1]]) == {
        "reward_a": 0.375,
        "rewards_failed": 0.0,
    }
    require_sound(scores)
    require_sound([])
    failed = [Scored(0.0, failure=f) for f in ("rare", "often", "often")]
    with pytest.raises(TreadleError, match=r"for all 3 completions of a step \(2 times: often\)"):
        require_sound(failed)
