"""Learning-rate schedules: the factor on the peak rate at step s (from 0) of S.

All rise linearly over the first W = round(warmup * S) steps, f(s) = (s + 1) / (W + 1), and reach
the peak at s = W. What follows is a function of the progress t = (s - W) / (S - W), which never
reaches 1: the last step still learns.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from typing import Annotated, Self

from pydantic import Field, model_validator

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.optim.optimizer import Schedule

CARD = Card(
    id="opt.schedules",
    paper="Vaswani et al. 2017; Loshchilov and Hutter 2017, arXiv:1608.03983; Hu et al. 2024, "
    "MiniCPM, arXiv:2404.06395; Haegele et al. 2024, arXiv:2405.18392; DeepSeek LLM 2024, "
    "arXiv:2401.02954",
    summary="Constant, cosine, linear, warmup-stable-decay, inverse square root, three phases.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/optim/test_optim_schedules.py::test_closed_forms",
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]


def rise(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """The factor of the warmup (1 once it is over) and the progress since, in [0, 1)."""
    wait = round(warmup * steps)
    if step < wait:
        return (step + 1) / (wait + 1), 0.0
    return 1.0, (step - wait) / max(1, steps - wait)


class Constant(Schedule):
    """The peak, after the warmup."""

    warmup: Share = 0.0

    def __call__(self, step: int, steps: int) -> float:
        return rise(step, steps, self.warmup)[0]


class Cosine(Schedule):
    """floor + (1 - floor) (1 + cos(pi t)) / 2."""

    warmup: Share = 0.03
    floor: Share = 0.0
    """Share of the peak that is left at the end."""

    def __call__(self, step: int, steps: int) -> float:
        up, t = rise(step, steps, self.warmup)
        return up * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2)


class Linear(Schedule):
    """floor + (1 - floor) (1 - t)."""

    warmup: Share = 0.03
    floor: Share = 0.0

    def __call__(self, step: int, steps: int) -> float:
        up, t = rise(step, steps, self.warmup)
        return up * (self.floor + (1 - self.floor) * (1 - t))


class Descent(Config):
    """A shape: how a decay phase falls, from 1 at t = 0 towards 0 at t = 1."""

    @abstractmethod
    def __call__(self, t: float) -> float:
        """Factor at progress t of the decay."""


class LinearDescent(Descent):
    """1 - t."""

    def __call__(self, t: float) -> float:
        return 1 - t


class SqrtDescent(Descent):
    """1 - sqrt(t): Haegele et al. found it a little better than linear."""

    def __call__(self, t: float) -> float:
        return 1 - math.sqrt(t)


class CosineDescent(Descent):
    """(1 + cos(pi t)) / 2."""

    def __call__(self, t: float) -> float:
        return (1 + math.cos(math.pi * t)) / 2


class ExponentialDescent(Descent):
    """2^(-halvings t): MiniCPM."""

    halvings: float = Field(default=10.0, gt=0.0)

    def __call__(self, t: float) -> float:
        return float(2 ** (-self.halvings * t))


class WSD(Schedule):
    """Warmup, stable, decay: the peak until the last `decay` share of the steps."""

    warmup: Share = 0.03
    decay: Share = 0.2
    shape: Descent = SqrtDescent()
    floor: Share = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} exceed the whole run")
        return self

    def __call__(self, step: int, steps: int) -> float:
        up, _ = rise(step, steps, self.warmup)
        fall = round(self.decay * steps)
        into = step - (steps - fall)
        if into < 0:
            return up
        return up * (self.floor + (1 - self.floor) * self.shape(into / fall))


class InverseSqrt(Schedule):
    """min(n / W, sqrt(W / n)) with n = s + 1: the transformer's own, scaled to a peak of 1."""

    warmup: Share = 0.03

    def __call__(self, step: int, steps: int) -> float:
        wait, n = max(1, round(self.warmup * steps)), step + 1
        return min(n / wait, math.sqrt(wait / n))


class ThreePhase(Schedule):
    """Three levels, one after another: learn fast, refine, settle (DeepSeek LLM's multi-step).

    At equal loss to cosine, the first phase can be reused to train longer.
    """

    warmup: Share = 0.03
    ends: tuple[Share, Share] = (0.8, 0.9)
    """Where the first and the second phase end, as shares of the steps."""
    levels: tuple[Share, Share, Share] = (1.0, 0.316, 0.1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.warmup <= self.ends[0] <= self.ends[1]:
            raise ValueError(f"need warmup <= ends[0] <= ends[1], got {self.warmup}, {self.ends}")
        return self

    def __call__(self, step: int, steps: int) -> float:
        up, _ = rise(step, steps, self.warmup)
        boundaries = [round(end * steps) for end in self.ends]
        return up * self.levels[bisect_right(boundaries, step)]
