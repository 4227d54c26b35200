"""The shape of an objective: a pure function of a model and a batch.

It returns a *sum* and what to divide it by. The loop divides once, by the weight of the whole
step over all micro-batches and ranks, so k x 1 accumulation equals 1 x k, and 2 ranks equal 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config
from treadle.kernels.linear_cross_entropy import HeadRule
from treadle.models.decoder import DecoderModel


@dataclass(frozen=True)
class LossOutput:
    """loss = total / weight."""

    total: Float[Tensor, ""]
    """Sum over what the batch holds, with gradient."""
    weight: Float[Tensor, ""]
    """What to divide by: tokens, sequences, pairs."""
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Further sums, reported divided by the same weight."""


class Objective(Config):
    """A shape: what is minimised."""

    @abstractmethod
    def __call__(self, model: DecoderModel, batch: Any) -> LossOutput:
        """The loss of one micro-batch. `batch` is the type that the objective's sources yield."""


def head_rule(model: DecoderModel, temperature: float = 1.0) -> HeadRule:
    return HeadRule(softcap=model.config.softcap, temperature=temperature)
