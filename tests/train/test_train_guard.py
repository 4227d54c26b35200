"""The guard: planted NaN and spikes, rollbacks, and that it leaves ordinary noise alone."""

from __future__ import annotations

import math
import random
import statistics
from collections import deque

import pytest
from train.tiny import TinyStream

from treadle.core.errors import TreadleError
from treadle.train.guard import (
    Guard,
    RobustSentinel,
    Sentinel,
    Unguarded,
    Verdict,
    data_digest,
    robust_z,
)


def warm(sentinel: Sentinel, steps: int = 160, *, seed: int = 0) -> int:
    """A falling, noisy loss; all of it good."""
    generator = random.Random(seed)
    for step in range(steps):
        loss = 4 * math.exp(-step / 40) + 2 + generator.gauss(0, 0.15)
        norm = math.exp(generator.gauss(0, 0.4))
        assert sentinel.verdict(step, loss, norm) is Verdict.GO, step
    return steps


@pytest.mark.parametrize(
    ("loss", "norm", "word"),
    [
        (math.nan, 1.0, "loss is nan"),
        (2.5, math.inf, "gradient norm is inf"),
        (9.0, 1.0, "loss 9"),
        (2.5, 5000.0, "gradient norm 5000"),
    ],
)
def test_planted_nan_and_spike(loss: float, norm: float, word: str) -> None:
    sentinel = Guard().build()
    step = warm(sentinel)
    assert sentinel.verdict(step, loss, norm, lambda: "abc") is Verdict.SKIP
    (event,) = sentinel.events()
    assert (event.step, event.verdict, event.data) == (step, "skip", "abc")
    assert word in event.reason
    assert sentinel.verdict(step + 1, 3.0, 1.0) is Verdict.GO
    assert not sentinel.refuses(step)


def test_nan_is_caught_before_there_is_a_history() -> None:
    sentinel = Guard().build()
    assert sentinel.verdict(0, math.nan, 1.0) is Verdict.SKIP
    assert sentinel.verdict(1, 1e9, 1e9) is Verdict.GO, "no spikes without a history"


def test_no_false_alarm_in_long_noisy_runs() -> None:
    for seed in range(5):
        warm(Guard().build(), 1500, seed=seed)


def test_losses_around_zero_raise_no_alarm() -> None:
    """Policy gradients: losses near zero, and steps without any gradient."""
    sentinel = Guard().build()
    for step in range(200):
        loss = 0.0 if step % 3 else 1e-3
        assert sentinel.verdict(step, loss, 0.0 if step % 2 else 1.0) is Verdict.GO
    assert sentinel.verdict(200, 0.1, 1.0) is Verdict.GO


def test_repeated_spikes_go_back_and_pass_over_what_led_there() -> None:
    sentinel = Guard(patience=3, lead=2).build()
    step = warm(sentinel)
    saved = sentinel.state()
    for i in range(4):
        sentinel.verdict(step + i, 2.5, 1.0)
    bad = step + 4
    assert sentinel.verdict(bad, 30.0, 1.0) is Verdict.SKIP
    assert sentinel.verdict(bad + 1, 30.0, 1.0) is Verdict.SKIP
    assert sentinel.verdict(bad + 2, 30.0, 1.0) is Verdict.ROLLBACK
    sentinel.restore(saved)
    refused = [s for s in range(step, step + 12) if sentinel.refuses(s)]
    assert refused == [bad - 2, bad - 1, bad, bad + 1, bad + 2]
    assert [e.verdict for e in sentinel.events()] == ["skip", "skip", "rollback"]

    # Another process that starts from a later checkpoint knows it too.
    fresh = Guard(patience=3, lead=2).build()
    fresh.restore(sentinel.state())
    assert fresh.refuses(bad)
    assert fresh.events() == sentinel.events()


def test_gives_up_with_a_remedy() -> None:
    sentinel = Guard(patience=2, rollbacks=1).build()
    step = warm(sentinel)
    saved = sentinel.state()
    sentinel.verdict(step, math.nan, 1.0)
    assert sentinel.verdict(step + 1, math.nan, 1.0) is Verdict.ROLLBACK
    sentinel.restore(saved)
    sentinel.verdict(step + 2, math.nan, 1.0)
    with pytest.raises(TreadleError, match=r"loss is nan.*lower optimizer\.lr") as error:
        sentinel.verdict(step + 3, math.nan, 1.0)
    assert "2 bad steps in a row" in str(error.value)


def test_state_continues_exactly() -> None:
    one = Guard(window=16, warmup=8).build()
    warm(one, 40)
    two = Guard(window=16, warmup=8).build()
    two.restore(one.state())
    generator = random.Random(3)
    for step in range(40, 80):
        loss = 2 + math.exp(generator.gauss(0, 1.5))
        assert one.verdict(step, loss, 1.0) is two.verdict(step, loss, 1.0)
    assert one.state() == two.state()
    assert one.events()


def test_robust_z_is_the_textbook_formula() -> None:
    generator = random.Random(0)
    history = deque(generator.gauss(5, 2) for _ in range(101))
    middle = sorted(history)[50]
    mad = statistics.median([abs(h - middle) for h in history])
    assert robust_z(9.0, history, 1e-9) == pytest.approx((9.0 - middle) / (1.4826 * mad))
    assert 1.4826 * mad == pytest.approx(2, rel=0.25), "the deviation of a normal variable"
    assert robust_z(9.0, history, 100.0) == pytest.approx((9.0 - middle) / 100.0)


def test_unguarded_takes_everything() -> None:
    sentinel = Unguarded().build()
    assert sentinel.verdict(0, math.nan, math.nan) is Verdict.GO
    assert not sentinel.refuses(0)
    assert not isinstance(sentinel, RobustSentinel)


def test_digest_tells_data_apart() -> None:
    stream = TinyStream()
    a, b = next(stream), next(stream)
    stream.restore({"step": 0})
    assert data_digest(a) == data_digest(next(stream))
    assert data_digest(a) != data_digest(b)
