"""Scoring: what a verifier may do wrong, and what is counted of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from treadle.alignment.rewards import Part, Reward, Weighted, WorstOf
from treadle.alignment.scoring import reward_metrics, scorer
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.scored import OvertimeError, Scored, require_sound, time_limit

PROBLEM = Problem((user("?"),), "", "any")


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
        ("unheard of", 0.0, "KeyError: 'unheard of'"),
    ],
)
@pytest.mark.parametrize("reward", [None, MarksOf()])
def test_whatever_a_verifier_does_there_is_a_score(
    reward: Reward | None, said: str, value: float, failure: str
) -> None:
    assert scorer(Marks(), reward, 0.1)(PROBLEM, said) == Scored(value, failure=failure)


def test_what_is_no_reward_is_not_hidden_among_others() -> None:
    """The least of 1 and what is no number would be 1."""
    parts = (Part(name="fine", reward=MarksOf(said="whole")), Part(name="odd", reward=MarksOf()))
    weigh = scorer(Marks(), Weighted(parts=parts, together=WorstOf()), 1.0)
    assert weigh(PROBLEM, "half") == Scored(0.5, {"fine": 1, "odd": 0.5})
    assert weigh(PROBLEM, "nan") == Scored(0.0, failure="the reward `odd` was nan")


def test_a_misconfigured_verifier_ends_the_run() -> None:
    class Wrong(Marks):
        def score(self, problem: Problem, completion: str) -> float:
            raise TreadleError("the problem has no tests")

    with pytest.raises(TreadleError, match="has no tests"):
        scorer(Wrong(), None, 1.0)(PROBLEM, "half")


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
        found.append(scorer(Marks(), None, 0.01)(PROBLEM, "half"))

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
