"""Rank allocation of AdaLoRA: a shrinking budget of singular values, spent where they matter.

    I = |w dL/dw|      I' <- b1 I' + (1 - b1) I      U' <- b2 U' + (1 - b2) |I - I'|      s = I' U'
    S_k = s(e_k) + mean_i s(P_ik) + mean_j s(Q_kj)                   importance of triplet k
    e_k <- 0   unless S_k is among the b(t) largest of the whole model
    b(t) = b1 + (b0 - b1) (1 - (t - begin) / (end - begin))^3

Zhang et al. 2023, arXiv:2303.10512, section 3. It goes around any optimiser and works after each
of its steps. What it remembers is the optimiser's state, so checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.optim.optimizer import Optimizer


class AllocateRanks(Optimizer):
    """Another optimiser that also cuts the ranks of `AdaLoRA` layers."""

    optimizer: Optimizer
    rank: int = Field(default=8, ge=1)
    """Singular values that a layer has in the end, on average."""
    begin: int = Field(default=0, ge=0)
    """Steps before the first cut."""
    end: int = Field(ge=1)
    """Steps after which ranks stay as they are; a good part of the run should follow."""
    every: int = Field(default=1, ge=1)
    """Steps between cuts."""
    smoothing: float = Field(default=0.85, gt=0.0, lt=1.0)
    """b1."""
    uncertainty: float = Field(default=0.85, gt=0.0, lt=1.0)
    """b2."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin={self.begin} must come before end={self.end}")
        return self

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        triplets = find_triplets(parameters)
        before = sum(t.e.numel() for t in triplets)
        if not triplets:
            raise ConfigError("AllocateRanks: no AdaLoRA layer trains; add the transform AdaLoRA")
        if before < self.rank * len(triplets):
            raise ConfigError(
                f"AllocateRanks: rank={self.rank} is to be the mean of what remains, but the "
                f"layers start with {before / len(triplets):g}; raise AdaLoRA's rank"
            )
        built = self.optimizer.build(parameters)
        built.param_groups[0].setdefault("allocation_step", 0)

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            step = optimizer.param_groups[0]["allocation_step"] = (
                optimizer.param_groups[0]["allocation_step"] + 1
            )
            if step < self.end:
                self._observe(optimizer, triplets)
            if step >= self.end or (step > self.begin and step % self.every == 0):
                _keep(optimizer, triplets, self.budget(step, before, self.rank * len(triplets)))

        built.register_step_post_hook(after_step)
        return built

    def budget(self, step: int, before: int, after: int) -> int:
        """b(t): how many singular values of the model are left after step `step`, from 1."""
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return int(after + (before - after) * left**3)

    @torch.no_grad()
    def _observe(self, optimizer: torch.optim.Optimizer, triplets: Sequence[Triplets]) -> None:
        for w in (w for t in triplets for w in (t.P, t.e, t.Q)):
            assert w.grad is not None
            memory = optimizer.state[w]
            now = (w * w.grad).abs()
            if "importance" not in memory:
                memory["importance"] = torch.zeros_like(w)
                memory["uncertainty"] = torch.zeros_like(w)
            mean: Tensor = memory["importance"]
            mean.lerp_(now, 1 - self.smoothing)
            memory["uncertainty"].lerp_((now - mean).abs(), 1 - self.uncertainty)


@dataclass(frozen=True)
class Triplets:
    """The factors of one layer."""

    P: nn.Parameter
    e: nn.Parameter
    Q: nn.Parameter


def find_triplets(parameters: Sequence[tuple[str, nn.Parameter]]) -> list[Triplets]:
    """Those of every AdaLoRA layer, by the names of its parameters."""
    known = dict(parameters)
    layers = [n.removesuffix(".e") for n in known if n.endswith(".e")]
    return [Triplets(known[f"{n}.P"], known[f"{n}.e"], known[f"{n}.Q"]) for n in layers]


@torch.no_grad()
def _keep(optimizer: torch.optim.Optimizer, triplets: Sequence[Triplets], budget: int) -> None:
    """Switch off all singular values but the most important."""
    scores = [
        _score(optimizer, t.e) + _score(optimizer, t.P).mean(0) + _score(optimizer, t.Q).mean(1)
        for t in triplets
    ]
    together = torch.cat(scores)
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[together.topk(budget).indices] = True
    for t, keep in zip(triplets, kept.split([len(s) for s in scores]), strict=True):
        t.e.masked_fill_(~keep, 0.0)


def _score(optimizer: torch.optim.Optimizer, w: nn.Parameter) -> Float[Tensor, "..."]:
    memory = optimizer.state[w]
    return memory["importance"] * memory["uncertainty"]  # type: ignore[no-any-return]
