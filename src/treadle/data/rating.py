"""Rating answers: rules, reward models, several of them together, and the verifiers of problems.

A rule that crashes, hangs or gives no number costs its answer the marks and is counted; it never
costs the run.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem
from treadle.data.source import Env


@dataclass(frozen=True)
class Scored:
    """A reward, and where it comes from."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """By name, where several are weighed."""
    failure: str = ""
    """What went wrong with the verifier; the value is 0 then."""


Rater = Callable[[Problem, Sequence[str]], list[Scored]]
"""Rates several answers to one problem."""


class Rating(Config):
    """A shape: how good answers are, each between 0 and 1."""

    @abstractmethod
    def open(self, env: Env, patience: float) -> Rater:
        """Called once, before the first answer.

        Args:
            patience: seconds after which a rule is given up, for each answer.
        """


def guarded(rate: Callable[[Problem, str], float], seconds: float) -> Rater:
    """Each answer by itself, patiently."""
    return lambda problem, texts: [patiently(rate, problem, text, seconds) for text in texts]


def scorer(problems: Problems, seconds: float) -> Callable[[Problem, str], Scored]:
    """The problems' own verifier, for an answer at a time."""
    return lambda problem, text: patiently(problems.score, problem, text, seconds)


def patiently(
    rate: Callable[[Problem, str], float], problem: Problem, text: str, seconds: float
) -> Scored:
    """What a rule gives within a time.

    Raises:
        TreadleError: the rule itself is misconfigured: it can score nothing.
    """
    try:
        with time_limit(seconds):
            value = rate(problem, text)
            if not math.isfinite(value):
                return Scored(0.0, failure=f"the reward was {value}")
    except TreadleError:
        raise
    except (Exception, OvertimeError, SystemExit) as error:  # a verifier may fail in any way
        return Scored(0.0, failure=f"{type(error).__name__}: {error}"[:200])
    return Scored(value)


class OvertimeError(BaseException):
    """A verifier took too long. Like `KeyboardInterrupt` it is no `Exception`: a verifier that goes
    on whatever happens would go on for ever."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code (and its regular expressions) after so long.

    By a timer's signal, so only in the main thread of a POSIX system; elsewhere there is no limit.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OvertimeError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def require_sound(scores: Sequence[Scored]) -> None:
    """Raise TreadleError where every single verification failed."""
    failures = Counter(s.failure for s in scores if s.failure)
    if scores and failures.total() == len(scores):
        reason, count = failures.most_common(1)[0]
        raise TreadleError(
            f"the verifier failed for all {len(scores)} completions of a step ({count} times: "
            f"{reason}): mend it before going on"
        )


def reward_metrics(scores: Sequence[Scored]) -> dict[str, float]:
    """Means of named rewards, and how many verifications failed; of those that are only watched,
    each where it failed."""
    sound = [s for s in scores if not s.failure]
    found = {"rewards_failed": float(len(scores) - len(sound))}
    for name in sorted({name for s in sound for name in s.parts}):
        values = [s.parts[name] for s in sound if name in s.parts]
        found[f"reward_{name}"] = math.fsum(values) / len(values)
        if len(values) < len(sound):
            found[f"reward_{name}_failed"] = float(len(sound) - len(values))
    return found
