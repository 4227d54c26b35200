"""LoRA on the stacked weights of a mixture's experts: a change of low rank for each of them.

    [g; u]_e = [W_g; W_u]_e x + s B_e A_e x,     y = W_d,e a(g) u + s B'_e A'_e a(g) u

Gate and up share A, as PEFT has it where both are one tensor (its `target_parameters`). Tokens
are sorted by expert, so that the narrow products are as many as the wide ones, and no change is
ever written out at the size of the experts.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.kernels.gated import gated
from treadle.kernels.grouped import grouped_linear
from treadle.nn.ffn.moe import Experts
from treadle.nn.linear import compute_dtype
from treadle.peft.adapter import AdapterLayer
from treadle.peft.low_rank import EXPERT_TENSORS, LowRank, check_rank

CARD = Card(
    id="ft.lora.experts",
    paper="Hu et al. 2021, LoRA, arXiv:2106.09685; Jiang et al. 2024, Mixtral, arXiv:2401.04088",
    summary="LoRA on fused expert tensors, a factor pair for each expert; PEFT's folder layout.",
    recipe="treadle run quickstart-scratch steps.1.fit.steps=200 "
    "'steps.1.transforms=[{kind: LoRA, targets: [q, v, experts]}]' steps.1.model.decoder.blocks.0."
    "ffn='{kind: MoE, expert: {kind: GatedMLP, hidden: 352}, experts: 4, top_k: 2}'",
    oracle="tests/peft/test_peft_lora_experts.py::test_matches_peft",
)


class ExpertFactors(nn.Module):
    """A and B of every expert, laid out as PEFT's two matrices are."""

    def __init__(self, like: Float[Tensor, "E _ in"], out: int, config: LowRank) -> None:
        super().__init__()
        experts, _, inputs = like.shape
        self.A = nn.Parameter(torch.empty(experts, config.rank, inputs, device=like.device))
        self.B = nn.Parameter(torch.zeros(out, config.rank, experts, device=like.device))
        self.scale = config.scale
        config.init(self.A.detach().flatten(0, 1))

    def forward(self, x: Float[Tensor, "M in"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M o"]:
        """s B_e A_e x."""
        h = grouped_linear(x, self.A.to(x.dtype), counts)
        return self.scale * grouped_linear(h, self.B.to(x.dtype).permute(2, 0, 1), counts)

    def change(self) -> Float[Tensor, "E out in"]:
        """s B A of each expert, in fp32."""
        return self.scale * torch.einsum("ore,eri->eoi", self.B, self.A)

    def peft_tensors(self, front: str) -> dict[str, Tensor]:
        return {
            f"{front}lora_A.weight": self.A.flatten(0, 1),
            f"{front}lora_B.weight": self.B.flatten(1, 2),
        }


class LoRAExperts(AdapterLayer):
    base: Experts
    peft_parameters = EXPERT_TENSORS

    def __init__(self, base: Experts, config: LowRank, name: str) -> None:
        if config.dropout:
            raise ConfigError(
                f"LoRA: dropout={config.dropout} on `{name}`: PEFT reads no adapter of experts "
                "with dropout; set dropout=0, or take other targets"
            )
        for leaf, weight in (("gate", base.gate), ("up", base.up), ("down", base.down)):
            check_rank("LoRA", config.rank, f"{name}.{leaf}", weight.shape[1:])
        super().__init__(base, config)
        self.gate_up = ExpertFactors(base.gate, 2 * base.gate.shape[1], config)
        self.down = ExpertFactors(base.down, base.down.shape[1], config)

    def adapted(  # type: ignore[override]  # rows come with the number of each expert's
        self, x: Float[Tensor, "M D"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "M D"]:
        base, x = self.base, x.to(compute_dtype(x))
        gate, up = self.gate_up(x, counts).chunk(2, -1)
        gate = gate + grouped_linear(x, base.gate, counts)
        up = up + grouped_linear(x, base.up, counts)
        inner = gated(gate, up, base.activation)
        change: Tensor = self.down(inner, counts)
        return grouped_linear(inner, base.down, counts) + change

    @torch.no_grad()
    def merged(self) -> nn.Module:
        plain = copy.copy(self.base)  # its settings; parameters are put in below
        plain._parameters = dict(self.base._parameters)
        gate, up = self.gate_up.change().chunk(2, 1)
        for leaf, change in (("gate", gate), ("up", up), ("down", self.down.change())):
            weight: Tensor = getattr(self.base, leaf)
            changed = (weight.float() + change).to(weight.dtype)
            setattr(plain, leaf, nn.Parameter(changed, requires_grad=False))
        return plain.train(self.training)

    def peft_tensors(self) -> dict[str, Tensor]:
        """PEFT nests the wrapper of `gate_up_proj` in that of `down_proj`."""
        return {**self.gate_up.peft_tensors("base_layer."), **self.down.peft_tensors("")}
