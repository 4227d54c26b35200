"""How long a task will still take, with the clock in our hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.core import progress
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Step, Workspace
from treadle.core.progress import Estimate, Lines, Silent, Task


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_the_pace_so_far_goes_on(wait: Callable[[float], None]) -> None:
    estimate = Estimate(10)
    assert estimate.left(0) is None
    wait(6)
    assert estimate.left(2) == pytest.approx(24)


def test_a_task_that_goes_on_counts_from_where_it_was(wait: Callable[[float], None]) -> None:
    estimate = Estimate(100)
    assert estimate.left(90) is None
    wait(5)
    assert estimate.left(95) == pytest.approx(5)


def test_a_slow_start_does_not_turn_minutes_into_hours(wait: Callable[[float], None]) -> None:
    """60 s are expected; after 12 s a hundredth is done. By pace alone 1,188 s were left."""
    estimate = Estimate(100, expected=60)
    assert estimate.left(0) == pytest.approx(60)
    wait(12)
    assert 60 < estimate.left(1) < 90
    wait(600)
    assert estimate.left(51) == pytest.approx((612 + 60) / (30.6 + 60) * 29.4)


def test_lines_say_what_is_left(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Lines(every=10).task("reading", 1000) as task:
        task.update(0)
        wait(4000)
        task.update(400, note="calm")
    assert capsys.readouterr().err == "reading: 400/1000, 1:40:00 left calm\n"


class Moves(Task):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, completed: float, *, note: str = "") -> None:
        self.seen.append(completed)

    def close(self) -> None:
        return


class Watched(Silent):
    """Keeps the moves of each task by name."""

    def __init__(self) -> None:
        self.tasks: dict[str, Moves] = {}

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        return self.tasks.setdefault(name, Moves())


class Nested(Step):
    """Two halves, each with work of its own, and something after them."""

    def execute(self, workspace: Workspace) -> dict[str, str]:
        with workspace.progress.task("halves", 2) as halves:
            for half in (1, 2):
                with workspace.progress.task("answers", 10) as answers:
                    answers.update(10)
                halves.update(half)
        with workspace.progress.task("after", 4) as after:
            after.update(1)
        return {"kind": "nothing"}


def test_work_within_work_does_not_move_the_whole(tmp_path: Path) -> None:
    watched = Watched()
    execute(Pipeline(name="p", steps=(Nested(name="n", minutes=3.0),)), tmp_path, watched)
    assert watched.tasks["answers"].seen == [10, 10]
    assert watched.tasks["p"].seen == [0, 1.5, 3.0, 3.0]
