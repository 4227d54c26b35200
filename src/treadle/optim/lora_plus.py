"""LoRA+: the factor of LoRA that starts at zero learns faster than the other.

    lr(B) = ratio * lr(A)

Hayou et al. 2024, arXiv:2402.12354: in wide layers equal rates let A and B learn features
unevenly. It goes around any optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.optim.optimizer import Optimizer

CARD = Card(
    id="ft.lora.plus",
    paper="Hayou et al. 2024, LoRA+, arXiv:2402.12354",
    summary="A learning rate of its own, higher, for the factor of LoRA that starts at zero.",
    recipe="treadle run fine-tune "
    "steps.sft.optimizer='{kind: LoRAPlus, optimizer: {kind: AdamW, lr: 5e-4}}'",
    oracle="tests/optim/test_optim_lora_plus.py::test_matches_peft",
)


class LoRAPlus(Optimizer):
    """Another optimiser with a higher learning rate for B."""

    optimizer: Optimizer
    """Its learning rate is that of A, and of everything that is no factor of LoRA."""
    ratio: float = Field(default=16.0, ge=1.0)

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        fast = {id(p) for name, p in parameters if name.rpartition(".")[2] == "B"}
        if not fast:
            raise ConfigError(
                "LoRAPlus: no factor B trains; add a LoRA, or take its optimiser bare"
            )
        built = self.optimizer.build(parameters)
        for group in list(built.param_groups):
            chosen = [p for p in group["params"] if id(p) in fast]
            if not chosen:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in fast]
            built.add_param_group({**group, "params": chosen, "lr": group["lr"] * self.ratio})
        built.param_groups[:] = [g for g in built.param_groups if g["params"]]
        return built
