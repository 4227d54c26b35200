"""Calling a verifier: one that crashes, hangs or gives no number costs its answer the marks and is
counted; it never costs the run."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from treadle.core.errors import TreadleError


@dataclass(frozen=True)
class Scored:
    """Marks, and where they come from."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """By name, where several are weighed."""
    failure: str = ""
    """What went wrong with the verifier; the value is 0 then."""


def patiently(verify: Callable[[], tuple[float, Mapping[str, float]]], seconds: float) -> Scored:
    """What `verify` gives within a time: a value, and the named parts it is made of.

    Raises:
        TreadleError: the verifier itself is misconfigured: it can score nothing.
    """
    try:
        with time_limit(seconds):
            value, parts = verify()
            # Some ways to weigh rewards, such as the least of them, would hide one that is none.
            for name, number in (*parts.items(), ("", value)):
                if not math.isfinite(number):
                    which = f"the reward `{name}`" if name else "the reward"
                    return Scored(0.0, failure=f"{which} was {number}")
    except TreadleError:
        raise
    except (Exception, OvertimeError) as error:  # a verifier may fail in any way
        return Scored(0.0, failure=f"{type(error).__name__}: {error}"[:200])
    return Scored(value, parts)


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
