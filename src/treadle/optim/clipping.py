"""Gradient clipping, in place; each way returns the global norm before.

NormClip   g <- g min(1, c / |g|)                                     Pascanu et al. 2013
ValueClip  g <- clamp(g, -c, c)
AGC        g_i <- g_i min(1, c max(|w_i|, eps) / |g_i|)               Brock et al. 2021
           for each unit i: a row of a matrix, or a whole vector
ZClip      z = (|g| - mu) / sigma;  where z > z*:  |g| <- mu + (z*^2 / z) sigma
           mu, sigma: running mean and deviation of |g|               Kumar et al. 2025
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treadle.core.cards import Card
from treadle.optim.optimizer import Clip, Clipper

CARD = Card(
    id="opt.clip",
    paper="Pascanu et al. 2013; Brock et al. 2021, AGC, arXiv:2102.06171; "
    "Kumar et al. 2025, ZClip, arXiv:2504.02507",
    summary="Bounds gradients by norm, by value, by the weights they change, or by their history.",
    recipe="treadle run quickstart-scratch steps.1.fit.clip.max_norm=0.5",
    oracle="tests/optim/test_optim_clipping.py::test_norm_and_value_match_torch",
)


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Euclidean norm of all gradients together, in fp32; over all ranks where they are sharded."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for grad in gradients(parameters):
        mesh = grad.device_mesh if isinstance(grad, DTensor) else None
        groups.setdefault((mesh, grad.device), []).append(grad)
    squares = 0.0
    for group in groups.values():
        norms = torch._foreach_norm(group, 2.0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return math.sqrt(squares)


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`."""
    if grads := gradients(parameters):
        torch._foreach_mul_(grads, factor)


class NoClip(Clip):
    """Measures and leaves gradients as they are."""

    def build(self) -> Clipper:
        return NormClipper(math.inf)


class NormClip(Clip):
    """Bounds the global norm."""

    max_norm: float = Field(default=1.0, gt=0.0)

    def build(self) -> Clipper:
        return NormClipper(self.max_norm)


class NormClipper(Clipper):
    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        norm = gradient_norm(parameters)
        if norm > self.max_norm and math.isfinite(norm):
            scale_gradients(parameters, self.max_norm / norm)
        return norm


class ValueClip(Clip):
    """Bounds every element."""

    max_value: float = Field(default=1.0, gt=0.0)

    def build(self) -> Clipper:
        return ValueClipper(self.max_value)


class ValueClipper(Clipper):
    def __init__(self, max_value: float) -> None:
        self.max_value = max_value

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        norm = gradient_norm(parameters)
        for grad in gradients(parameters):
            grad.clamp_(-self.max_value, self.max_value)
        return norm


class AGC(Clip):
    """Adaptive: bounds each unit's gradient by its weight's norm."""

    ratio: float = Field(default=0.01, gt=0.0)
    eps: float = Field(default=1e-3, gt=0.0)
    """Least weight norm that counts, so that fresh zeros can move."""

    def build(self) -> Clipper:
        return AdaptiveClipper(self)


class AdaptiveClipper(Clipper):
    def __init__(self, config: AGC) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        norm = gradient_norm(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            weight, grad = unit_norm(parameter), unit_norm(parameter.grad)
            bound = self.config.ratio * weight.clamp(min=self.config.eps)
            factor = (bound / grad.clamp(min=1e-12)).clamp(max=1.0)
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return norm


def unit_norm(x: Tensor) -> Tensor:
    """Norm of each row of a matrix (all its other dimensions), or of a whole vector; fp32."""
    dims = tuple(range(1, x.ndim)) or tuple(range(x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return norm


class ZClip(Clip):
    """Bounds norms that stand out from their own history."""

    z: float = Field(default=2.5, gt=0.0)
    alpha: float = Field(default=0.97, gt=0.0, lt=1.0)
    """Memory of the running mean and variance."""
    warmup: int = Field(default=25, ge=2)
    """Steps that only gather statistics."""
    max_norm: float = Field(default=1.0, gt=0.0)
    """Bound of the norm during the warmup and after it."""

    def build(self) -> Clipper:
        return ZClipper(self)


class ZClipper(Clipper):
    def __init__(self, config: ZClip) -> None:
        self.config = config
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, parameters: Sequence[nn.Parameter]) -> float:
        norm = gradient_norm(parameters)
        if math.isfinite(norm):
            bound = min(self._learn(norm), self.config.max_norm)
            if norm > bound:
                scale_gradients(parameters, bound / norm)
        return norm

    def _learn(self, norm: float) -> float:
        """The norm that `norm` is brought down to; the statistics take in that one."""
        if len(self.first) < self.config.warmup:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((n - self.mean) ** 2 for n in self.first) / len(self.first)
            return norm
        sigma = math.sqrt(self.variance)
        z = (norm - self.mean) / (sigma + 1e-12)
        if z > self.config.z:
            norm = self.mean + self.config.z**2 / z * sigma
        self.mean += (1 - self.config.alpha) * (norm - self.mean)
        self.variance += (1 - self.config.alpha) * ((norm - self.mean) ** 2 - self.variance)
        return norm

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "mean": self.mean, "variance": self.variance}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.first = list(state["first"])
        self.mean, self.variance = state["mean"], state["variance"]
