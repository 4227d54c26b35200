"""What stands in the place of a linear layer: adapters, quantised weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearLike(nn.Module, ABC):
    """A module that computes x W^T + b with a weight of its own making."""

    in_features: int
    out_features: int

    @abstractmethod
    def effective_weight(self) -> Float[Tensor, "out in"]:
        """The dense W, differentiable with respect to whatever is trained."""

    @abstractmethod
    def effective_bias(self) -> Float[Tensor, " out"] | None:
        """The dense b."""


def weight_of(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The dense weight of a linear layer, plain or not."""
    if isinstance(linear, LinearLike):
        return linear.effective_weight()
    assert isinstance(linear, nn.Linear), f"{type(linear).__name__} is not a linear layer"
    return linear.weight


def bias_of(linear: nn.Module) -> Float[Tensor, " out"] | None:
    """The dense bias of a linear layer, plain or not."""
    if isinstance(linear, LinearLike):
        return linear.effective_bias()
    assert isinstance(linear, nn.Linear), f"{type(linear).__name__} is not a linear layer"
    return linear.bias


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer works on `x`: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
