"""AdamW whose two moments are kept in 8 bits: 2 bytes a parameter instead of 8.

    m, v <- numbers of their codes
    the step of AdamW, in fp32
    codes <- nearest codes of m, v,   in blocks of 256 with a peak each

Dettmers et al. 2022, arXiv:2110.02861. v has no sign and spends its bits on magnitude. Parameters
of fewer than 4096 numbers keep fp32 moments: norms and biases are few, and sensitive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.kernels.dynamic_codes import DynamicCodes, from_codes, into_codes
from treadle.optim.decay import DecayMatrices, DecayRule, decay_groups
from treadle.optim.optimizer import Optimizer

CARD = Card(
    id="opt.eight_bit",
    paper="Dettmers et al. 2022, 8-bit optimizers, arXiv:2110.02861",
    summary="AdamW with moments in 8 bits, by block-wise dynamic quantisation.",
    recipe="treadle run fine-tune steps.sft.optimizer='{kind: AdamW8bit, lr: 2e-3}'",
    oracle="tests/optim/test_optim_adamw8bit.py::test_matches_torchao",
)
SMALL = 4096
MOMENTS = (("m", True), ("v", False))
"""Name of each moment, and whether it has a sign."""


class AdamW8bit(Optimizer):
    """AdamW with 8-bit states."""

    lr: float = Field(ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    decay: DecayRule = DecayMatrices()

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if not parameters:
            raise ConfigError("AdamW8bit: nothing trains; a transform has frozen every parameter")
        groups = decay_groups(parameters, self.weight_decay, self.decay)
        return EightBitAdamW(groups, {"lr": self.lr, "betas": self.betas, "eps": self.eps})


class EightBitAdamW(torch.optim.Optimizer):
    """State of a parameter: `step`; `m` and `v` in fp32, or their codes with `m_peaks`,
    `v_peaks`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes gradients itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        grad = parameter.grad
        assert grad is not None
        grad = grad.float()
        t = state["step"] = state.get("step", 0) + 1
        m, v = (_read(state, name, signed, grad) for name, signed in MOMENTS)
        b1, b2 = group["betas"]
        m.mul_(b1).add_(grad, alpha=1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = v.sqrt().div_(math.sqrt(1 - b2**t)).add_(group["eps"])
        weights = parameter.float()
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(m, root, value=-group["lr"] / (1 - b1**t))
        if weights is not parameter:
            parameter.copy_(weights)
        for (name, signed), moment in zip(MOMENTS, (m, v), strict=True):
            _write(state, name, signed, moment)


def _read(state: dict[str, Any], name: str, signed: bool, like: Tensor) -> Tensor:
    """A moment in fp32; zeros where there is none yet."""
    if name not in state:
        return torch.zeros_like(like)
    if like.numel() < SMALL:
        kept: Tensor = state[name]
        return kept
    return from_codes(DynamicCodes(state[name], state[f"{name}_peaks"]), signed=signed)


def _write(state: dict[str, Any], name: str, signed: bool, moment: Tensor) -> None:
    if moment.numel() < SMALL:
        state[name] = moment
        return
    stored = into_codes(moment, signed=signed)
    state[name], state[f"{name}_peaks"] = stored.codes, stored.peaks
