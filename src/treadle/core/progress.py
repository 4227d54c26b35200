"""Progress: nested tasks with the time they will still take.

Work is told where it may report (`Progress`), never how that looks: a terminal shows bars, a log
file gets a line now and then, a test gets nothing.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars


class Task(ABC):
    """One piece of work; a context manager that ends it."""

    @abstractmethod
    def update(self, completed: float, *, note: str = "") -> None:
        """Say how far it is, and a few words such as the current loss."""

    @abstractmethod
    def close(self) -> None:
        """It is over, finished or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Progress(ABC):
    """Where work reports."""

    @abstractmethod
    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        """Begin a task.

        Args:
            total: units of work; None where nobody knows how many.
            expected: seconds that all of it takes on a usual machine, where somebody knows.
        """

    @abstractmethod
    def say(self, line: str) -> None:
        """A line for the user that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""
        return


class Estimate:
    """How long a task will still take, by its pace so far.

    Where a duration is expected, the pace is drawn towards it as if `PRIOR` seconds of that pace
    had been seen before: a slow first step does not turn minutes into hours.
    """

    PRIOR = 60.0

    def __init__(self, total: float | None, expected: float | None = None) -> None:
        self.total, self.expected = total, expected
        self.start, self.first = time.monotonic(), 0.0 if expected else None

    def left(self, completed: float) -> float | None:
        """Seconds, or None while nothing can be said."""
        elapsed = time.monotonic() - self.start
        if self.first is None:
            self.first = completed  # a task that goes on from here
        done = completed - self.first
        if self.total is None or (done <= 0 and not self.expected):
            return None
        if not self.expected:
            return elapsed * (self.total - completed) / done
        pace = (elapsed + self.PRIOR) / (self.expected * done / self.total + self.PRIOR)
        return pace * self.expected * (self.total - completed) / self.total


class Silent(Progress):
    """Shows nothing."""

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        return _NoTask()

    def say(self, line: str) -> None:
        return


class _NoTask(Task):
    def update(self, completed: float, *, note: str = "") -> None:
        return

    def close(self) -> None:
        return


class Terminal(Progress):
    """Bars that move, on a terminal."""

    def __init__(self) -> None:
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.bars.start()

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        task = self.bars.add_task(name, total=total, note="", left="-:--")
        return _Bar(self.bars, task, Estimate(total, expected))

    def say(self, line: str) -> None:
        self.bars.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self.bars.stop()


class _Bar(Task):
    def __init__(self, bars: Bars, task: TaskID, estimate: Estimate) -> None:
        self.bars, self.id, self.estimate = bars, task, estimate

    def update(self, completed: float, *, note: str = "") -> None:
        left = _clock(self.estimate.left(completed))
        self.bars.update(self.id, completed=completed, note=note, left=left)

    def close(self) -> None:
        self.bars.remove_task(self.id)


class Lines(Progress):
    """A line every `every` seconds, for log files."""

    def __init__(self, every: float = 10.0) -> None:
        self.every = every

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        return _Lines(self, name, Estimate(total, expected))

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Lines(Task):
    def __init__(self, parent: Lines, name: str, estimate: Estimate) -> None:
        self.parent, self.name, self.estimate = parent, name, estimate
        self.last = time.monotonic()

    def update(self, completed: float, *, note: str = "") -> None:
        left = self.estimate.left(completed)
        now, total = time.monotonic(), self.estimate.total
        if now - self.last < self.parent.every:
            return
        self.last = now
        said = f"{self.name}: {completed:.6g}" + ("" if total is None else f"/{total:.6g}")
        self.parent.say(f"{said}, {_clock(left)} left {note}".rstrip())

    def close(self) -> None:
        return


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def standard() -> Progress:
    """Bars on a terminal, else lines."""
    return Terminal() if sys.stderr.isatty() else Lines()
