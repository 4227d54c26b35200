"""How long a task will still take, with the clock in our hands."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from treadle.core import progress
from treadle.core.progress import Estimate, Lines


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
