"""Averages of whole weights: along the chord (soups) and along the arc (SLERP).

    linear    w = sum_i a_i w_i / sum_i a_i                Wortsman et al. 2022, arXiv:2203.05482
    slerp     w = sin((1 - t) phi) / sin(phi) u + sin(t phi) / sin(phi) v       Shoemake 1985
              phi the angle between u and v as flat vectors

Equal weights make a uniform soup. A chord between two vectors cuts through the inside of their
sphere and loses length; the arc does not.
"""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.merging.method import MergeMethod, Parts, weights_of

PARALLEL = 0.9995
"""Cosine beyond which the arc is taken for a line: sin(phi) would lose its digits."""


class Average(MergeMethod):
    """A weighted mean of the weights of any number of models."""

    weights: tuple[float, ...] = ()
    """One a model; none: all equal."""

    def check(self, count: int, *, has_base: bool) -> None:
        if not sum(weights_of(self.weights, count, "Average")):
            raise ConfigError("Average: the weights sum to zero")

    def __call__(self, parts: Parts) -> Float[Tensor, "..."]:
        weights = weights_of(self.weights, len(parts.tensors), "Average")
        total: Tensor = sum(
            (a * w for a, w in zip(weights, parts.tensors, strict=True)),
            start=parts.tensors[0].new_zeros(()),
        )
        return total / sum(weights)


class Slerp(MergeMethod):
    """Spherical interpolation between two models."""

    t: float = Field(default=0.5, ge=0.0, le=1.0)
    """0 is the first model, 1 the second."""

    def check(self, count: int, *, has_base: bool) -> None:
        if count != 2:
            raise ConfigError(f"Slerp: goes between 2 models, not {count}; take Average for more")

    def __call__(self, parts: Parts) -> Float[Tensor, "..."]:
        u, v = parts.tensors
        lengths = (u.double().norm() * v.double().norm()).clamp(min=1e-30)
        cosine = (u.double() * v.double()).sum() / lengths
        if abs(float(cosine)) > PARALLEL:
            return u.lerp(v, self.t)
        phi = cosine.arccos()
        first, second = ((1 - self.t) * phi).sin() / phi.sin(), (self.t * phi).sin() / phi.sin()
        merged: Tensor = first * u + second * v
        return merged.to(u.dtype)
