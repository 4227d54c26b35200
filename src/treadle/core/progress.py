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
    TimeRemainingColumn,
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
    def task(self, name: str, total: float | None) -> Task:
        """Begin a task of `total` units; None where nobody knows how many."""

    @abstractmethod
    def say(self, line: str) -> None:
        """A line for the user that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""
        return


class Silent(Progress):
    """Shows nothing."""

    def task(self, name: str, total: float | None) -> Task:
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
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.bars.start()

    def task(self, name: str, total: float | None) -> Task:
        return _Bar(self.bars, self.bars.add_task(name, total=total, note=""))

    def say(self, line: str) -> None:
        self.bars.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self.bars.stop()


class _Bar(Task):
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.id = bars, task

    def update(self, completed: float, *, note: str = "") -> None:
        self.bars.update(self.id, completed=completed, note=note)

    def close(self) -> None:
        self.bars.remove_task(self.id)


class Lines(Progress):
    """A line every `every` seconds, for log files."""

    def __init__(self, every: float = 10.0) -> None:
        self.every = every

    def task(self, name: str, total: float | None) -> Task:
        return _Lines(self, name, total)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Lines(Task):
    def __init__(self, parent: Lines, name: str, total: float | None) -> None:
        self.parent, self.name, self.total = parent, name, total
        self.start = self.last = time.monotonic()
        self.first: float | None = None

    def update(self, completed: float, *, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = completed
        if now - self.last < self.parent.every:
            return
        self.last = now
        if self.total is None:
            self.parent.say(f"{self.name}: {completed:g} {note}")
            return
        done = completed - self.first
        left = (now - self.start) * (self.total - completed) / done if done > 0 else float("nan")
        self.parent.say(f"{self.name}: {completed:g}/{self.total:g}, {left:.0f} s left {note}")

    def close(self) -> None:
        return


def standard() -> Progress:
    """Bars on a terminal, else lines."""
    return Terminal() if sys.stderr.isatty() else Lines()
