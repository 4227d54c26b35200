"""A scalar head on any decoder: a language model becomes a reward model."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.models.heads import put_head
from treadle.models.transform import Transform
from treadle.objectives.reward import ScoreHead

M = TypeVar("M", bound=nn.Module)


class RewardHead(Transform):
    """Puts a linear layer with one output in the place of the head; it is always trained.

    Adapters go before it, so that they do not freeze it. It starts at zero: no opinion on anything.
    """

    def __call__(self, model: M) -> M:
        return put_head(model, lambda m: LinearScore(m.config.dim), owner="RewardHead")


class LinearScore(ScoreHead):
    """w . h"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = hidden.float() @ self.linear.weight[0].float()
        return scores
