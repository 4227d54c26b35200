"""Schedules against closed forms worked by hand, torch's and transformers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from treadle.optim.optimizer import Schedule
from treadle.optim.schedules import (
    WSD,
    Constant,
    Cosine,
    CosineDescent,
    Descent,
    ExponentialDescent,
    InverseSqrt,
    Linear,
    LinearDescent,
    SqrtDescent,
    ThreePhase,
)

STEPS = 200


def curve(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [schedule(s, steps) for s in range(steps)]


def test_closed_forms() -> None:
    assert curve(Constant(), 3) == [1, 1, 1]
    assert Constant(warmup=0.02)(0, 100) == pytest.approx(1 / 3)
    assert Constant(warmup=0.02)(1, 100) == pytest.approx(2 / 3)
    assert Constant(warmup=0.02)(2, 100) == 1.0
    cosine = Cosine(warmup=0.1, floor=0.2)
    assert cosine(20, STEPS) == 1.0
    assert cosine(110, STEPS) == pytest.approx(0.2 + 0.8 * 0.5)
    assert cosine(80, STEPS) == pytest.approx(0.2 + 0.8 * 0.75)
    assert Linear(warmup=0.0, floor=0.5)(150, STEPS) == pytest.approx(0.5 + 0.5 * 0.25)
    wsd = WSD(warmup=0.1, decay=0.25, shape=SqrtDescent())
    assert [wsd(s, STEPS) for s in (20, 100, 149, 150)] == [1, 1, 1, 1]
    assert wsd(150 + 8, STEPS) == pytest.approx(1 - 0.4)
    assert WSD(decay=0.25, shape=ExponentialDescent(halvings=2.0))(175, STEPS) == 0.5
    assert WSD(decay=0.25, shape=LinearDescent(), floor=0.5)(175, STEPS) == 0.75
    rsqrt = InverseSqrt(warmup=0.1)
    assert [rsqrt(s, STEPS) for s in (4, 19, 79)] == pytest.approx([0.25, 1.0, 0.5])
    three = ThreePhase(warmup=0.0, ends=(0.5, 0.75), levels=(1.0, 0.3, 0.1))
    assert [three(s, 4) for s in range(4)] == [1.0, 1.0, 0.3, 0.1]


def theirs(scheduler: type | object, steps: int = STEPS) -> list[float]:
    """Run a scheduler of torch's protocol on a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer)  # type: ignore[operator]
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return factors


@pytest.mark.parametrize("warm", [0, 20])
def test_matches_transformers_after_warmup(warm: int) -> None:
    """Transformers rises from 0 (its first step learns nothing); the rest is the same."""
    lib = pytest.importorskip("transformers.optimization")
    share = warm / STEPS
    pairs = [
        (Cosine(warmup=share), lambda o: lib.get_cosine_schedule_with_warmup(o, warm, STEPS)),
        (Linear(warmup=share), lambda o: lib.get_linear_schedule_with_warmup(o, warm, STEPS)),
        (
            WSD(warmup=share, decay=0.3, shape=CosineDescent(), floor=0.1),
            lambda o: lib.get_wsd_schedule(
                o,
                warm,
                60,
                num_stable_steps=STEPS - 60 - warm,
                min_lr_ratio=0.1,
                decay_type="cosine",
            ),
        ),
    ]
    for ours, scheduler in pairs:
        assert curve(ours)[warm:] == pytest.approx(theirs(scheduler)[warm:], abs=1e-12)


def test_three_phases_match_torch_multistep() -> None:
    ours = ThreePhase(warmup=0.0, levels=(1.0, 0.5, 0.25))
    expected = theirs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [160, 180], gamma=0.5))
    assert curve(ours) == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule",
    [Constant(), Cosine(), Linear(), InverseSqrt(), ThreePhase()]
    + [WSD(shape=s) for s in (LinearDescent(), SqrtDescent(), CosineDescent())],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_every_step_learns_and_none_exceeds_the_peak(schedule: Schedule, steps: int) -> None:
    factors = curve(schedule, steps)
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [LinearDescent(), SqrtDescent(), CosineDescent()])
def test_descents_fall_from_one_to_zero(shape: Descent) -> None:
    values = [shape(i / 10) for i in range(11)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.0)
    assert values == sorted(values, reverse=True)
    assert math.isclose(ExponentialDescent(halvings=3.0)(1.0), 0.125)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"exceed the whole run"):
        WSD(warmup=0.6, decay=0.6)
    with pytest.raises(ValueError, match=r"warmup <= ends"):
        ThreePhase(ends=(0.9, 0.8))
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Cosine(warmup=100.0)
