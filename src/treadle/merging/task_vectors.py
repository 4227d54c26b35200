"""Merging by task vectors: what each model learned on top of one base is thinned, then added up.

    tau_i = w_i - w_0,     w = w_0 + scale * combine(thin(tau_1), thin(tau_2), ...)

    task arithmetic    all of tau, summed                                 Ilharco et al. 2023
    TIES               the largest of tau; mean of those of the elected sign   Yadav et al. 2023
    DARE               a random part of tau, made larger by as much; summed    Yu et al. 2024

Thinning and adding up are free to combine: DARE-TIES thins like the one and adds like the other.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.merging.method import MergeMethod, Parts, weights_of

CARD = Card(
    id="ft.merge",
    paper="Wortsman et al. 2022; Ilharco et al. 2023, arXiv:2212.04089; Yadav et al. 2023, TIES; "
    "Yu et al. 2024, DARE, arXiv:2311.03099",
    summary="Models of one shape become one: averages, SLERP, task arithmetic, TIES, DARE.",
    recipe="treadle merge runs/a runs/b --base smollm2-135m-instruct --method ties --to merged",
    oracle="tests/merging/test_merging_methods.py::test_ties_matches_peft",
)


class Thinning(Config):
    """A shape: which numbers of a task vector are kept."""

    @abstractmethod
    def __call__(self, tau: Float[Tensor, "..."], key: str) -> Float[Tensor, "..."]:
        """The thinned vector; `key` names tensor and model, and seeds what is random."""


class Whole(Thinning):
    """All of it."""

    def __call__(self, tau: Float[Tensor, "..."], key: str) -> Float[Tensor, "..."]:
        return tau


class Largest(Thinning):
    """Those of largest magnitude, a share `density` of each tensor (TIES)."""

    density: float = Field(default=0.2, gt=0.0, le=1.0)

    def __call__(self, tau: Float[Tensor, "..."], key: str) -> Float[Tensor, "..."]:
        kept = max(1, int(self.density * tau.numel()))
        places = tau.abs().flatten().topk(kept).indices
        thin = torch.zeros_like(tau).flatten()
        return thin.index_copy(0, places, tau.flatten()[places]).view(tau.shape)


class RandomRescaled(Thinning):
    """A random share `density`, divided by it, so that the mean stays (DARE)."""

    density: float = Field(default=0.2, gt=0.0, le=1.0)
    seed: int = 0

    def __call__(self, tau: Float[Tensor, "..."], key: str) -> Float[Tensor, "..."]:
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(key.encode()))
        kept = torch.rand(tau.shape, generator=generator) < self.density
        return tau * kept.to(tau.device) / self.density


class Combination(Config):
    """A shape: how the thinned vectors become one."""

    @abstractmethod
    def __call__(
        self, taus: Float[Tensor, "models ..."], weights: Float[Tensor, "models ..."]
    ) -> Float[Tensor, "..."]:
        """One vector; the weights have the dimensions of the vectors, of size 1."""


class SummedVectors(Combination):
    """sum_i a_i tau_i."""

    def __call__(
        self, taus: Float[Tensor, "models ..."], weights: Float[Tensor, "models ..."]
    ) -> Float[Tensor, "..."]:
        return (weights * taus).sum(0)


class SignElected(Combination):
    """The weighted mean of those that have the sign of the weighted sum (TIES)."""

    def __call__(
        self, taus: Float[Tensor, "models ..."], weights: Float[Tensor, "models ..."]
    ) -> Float[Tensor, "..."]:
        weighted = weights * taus
        elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agree = torch.where(taus == 0, 0.0, (weighted.sign() == elected).float())
        counted = (agree * weights.abs()).sum(0)
        return (agree * weighted).sum(0) / torch.where(counted == 0, 1.0, counted)


class TaskVectors(MergeMethod):
    """A base and the changes of its descendants."""

    weights: tuple[float, ...] = ()
    """One a model; none: all 1."""
    scale: float = 1.0
    thin: Thinning = Whole()
    combine: Combination = SummedVectors()

    def check(self, count: int, *, has_base: bool) -> None:
        weights_of(self.weights, count, "TaskVectors")
        if not has_base:
            raise ConfigError(
                "TaskVectors: task vectors are differences from a base; name the model that all "
                "were tuned from (--base), or take Average"
            )

    def __call__(self, parts: Parts) -> Float[Tensor, "..."]:
        assert parts.base is not None
        weights = weights_of(self.weights, len(parts.tensors), "TaskVectors")
        thin = stacked_taus(self.thin, parts)
        shaped = thin.new_tensor(weights).view(-1, *[1] * (thin.ndim - 1))
        return parts.base + self.scale * self.combine(thin, shaped)


def stacked_taus(thin: Thinning, parts: Parts) -> Float[Tensor, "models ..."]:
    """The thinned task vectors of one tensor."""
    assert parts.base is not None
    taus: Sequence[Tensor] = [
        thin(tensor - parts.base, f"{place}/{parts.name}")
        for place, tensor in enumerate(parts.tensors)
    ]
    return torch.stack(list(taus))


def named_methods() -> dict[str, MergeMethod]:
    """The merges that have a name, at their papers' settings."""
    from treadle.merging.averages import Average, Slerp

    return {
        "linear": Average(),
        "slerp": Slerp(),
        "task-arithmetic": TaskVectors(scale=0.4),
        "ties": TaskVectors(thin=Largest(), combine=SignElected()),
        "dare": TaskVectors(thin=RandomRescaled()),
        "dare-ties": TaskVectors(thin=RandomRescaled(), combine=SignElected()),
    }
