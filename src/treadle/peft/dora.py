"""DoRA: a weight's rows in magnitude and direction; LoRA turns the direction.

    W' = m (W + s B A) / ||W + s B A||,    ||.|| of each row,    m = ||W|| at the start

Liu et al. 2024, arXiv:2402.09353. The norm passes no gradient (their section 4.3), so it is taken
without ever writing W + s B A:

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b^T     for a row w of W and b of B
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import AdapterLayer
from treadle.peft.low_rank import LowRank, LowRankLinear, check_rank

CARD = Card(
    id="ft.lora.dora",
    paper="Liu et al. 2024, DoRA, arXiv:2402.09353",
    summary="LoRA on the direction of each row of a weight, beside a trained magnitude.",
    recipe="treadle run fine-tune 'steps.sft.transforms=[{kind: DoRA}]'",
    oracle="tests/peft/test_peft_dora.py::test_matches_peft",
)


class DoRA(LowRank):
    """Weight-decomposed low-rank adaptation of linear layers."""

    peft_type: ClassVar[str] = "LORA"
    peft_flags: ClassVar[tuple[str, ...]] = ("use_dora",)

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if not isinstance(base, nn.Linear | LinearLike):
            raise ConfigError(
                f"DoRA: `{name}` is a {type(base).__name__}; it goes on linear layers, LoRA on this"
            )
        check_rank("DoRA", self.rank, name, (base.out_features, base.in_features))
        return DoRALinear(base, self)


class DoRALinear(LowRankLinear):
    """m stays in fp32 as A and B do."""

    def __init__(self, base: nn.Linear | LinearLike, config: DoRA) -> None:
        super().__init__(base, config)
        self.m = nn.Parameter(weight_of(base).detach().float().norm(dim=1))

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype = compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        h = self.narrow(rows)
        y: Tensor = self.base(rows)
        bias = bias_of(self.base)
        if bias is not None:
            y = y - bias.to(y.dtype)
        y = torch.addmm(y, h, self.B.to(dtype).T, alpha=self.scale)
        y = y * (self.m / self.norm()).to(dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def norm(self) -> Float[Tensor, " out"]:
        """||W + s B A|| of each row, in fp32."""
        weight, s = weight_of(self.base).float(), self.scale
        cross = (self.B * (weight @ self.A.T)).sum(1)
        change = (self.B @ (self.A @ self.A.T) * self.B).sum(1)
        squared = torch.linalg.vecdot(weight, weight) + 2 * s * cross + s * s * change
        length: Tensor = squared.clamp(min=0).sqrt()
        return length

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        weight = (self.m / self.norm())[:, None] * self.changed_weight()
        return weight.to(weight_of(self.base).dtype)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.A,
            "lora_B.weight": self.B,
            "lora_magnitude_vector": self.m,
        }
