"""Shapes of optimisers, schedules and clipping."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from treadle.core.config import Config


class Optimizer(Config):
    """A shape: builds a torch optimiser for named parameters.

    Its learning rate is the peak; the loop multiplies it by the schedule at each step.
    """

    lr: float

    @abstractmethod
    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimiser of the parameters that train."""


class Schedule(Config):
    """A shape: the factor on the learning rate."""

    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Factor for step `step` (from 0) of `steps`."""


class Clip(Config):
    """A shape: bounds gradients in place."""

    @abstractmethod
    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        """Bound the gradients and return their norm before."""
