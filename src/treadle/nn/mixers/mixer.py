"""The shape of a token mixer."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from treadle.core.config import Config


class Mixer(Config):
    """A shape: lets tokens see each other."""

    @abstractmethod
    def build(self, dim: int, layer: int) -> nn.Module:
        """A module `(x [N dim], context) -> [N dim]`; `layer` names its place in caches."""
