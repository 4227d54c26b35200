"""Shapes of optimisers, schedules and clipping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from treadle.core.config import Config


class Optimizer(Config):
    """A shape: builds a torch optimiser for named parameters.

    The learning rate of each of its groups is the peak; the loop multiplies it by the schedule at
    each step.
    """

    @abstractmethod
    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimiser of the parameters that train."""


class Schedule(Config):
    """A shape: the factor on the learning rate."""

    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Factor for step `step` (from 0) of `steps`."""


class Clipper(ABC):
    """Bounds gradients in place; may learn from those it has seen."""

    @abstractmethod
    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        """Bound the gradients and return their global norm before (NaN or inf if they hold any).

        Sharded parameters (DTensor) are measured as a whole: every rank must call.
        """

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        return


class Clip(Config):
    """A shape: how gradients are bounded."""

    @abstractmethod
    def build(self) -> Clipper:
        """A clipper that has seen nothing yet."""
