"""AdamW: Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019).

    m <- b1 m + (1 - b1) g                 v <- b2 v + (1 - b2) g^2
    w <- w - lr * decay * w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

One fused kernel passes over all parameters where the device has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.optim.decay import DecayMatrices, DecayRule, decay_groups
from treadle.optim.optimizer import Optimizer

CARD = Card(
    id="opt.adamw",
    paper="Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101",
    summary="AdamW in one fused pass over all parameters.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/optim/test_optim_adamw.py::test_matches_naive_float64_loop",
)

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Device types for which torch has the fused kernel."""


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    lr: float = Field(ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    decay: DecayRule = DecayMatrices()

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if not parameters:
            raise ConfigError("AdamW: nothing trains; a transform has frozen every parameter")
        return torch.optim.AdamW(
            decay_groups(parameters, self.weight_decay, self.decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=all(p.device.type in FUSED and p.is_floating_point() for _, p in parameters),
        )
