"""A mixer that lets no token see another, for what is refused where nothing attends."""

from __future__ import annotations

from torch import Tensor, nn

from treadle.nn.context import Context
from treadle.nn.mixers.mixer import Mixer


class DeafLayer(nn.Module):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x


class Deaf(Mixer):
    """Lets no token see another."""

    def build(self, dim: int, layer: int) -> nn.Module:
        return DeafLayer()
