"""The one block skeleton: a mixer and a feed-forward on a residual stream."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.config import Config
from treadle.nn.context import Context
from treadle.nn.ffn.ffn import FeedForward
from treadle.nn.mixers.mixer import Mixer
from treadle.nn.norms import Norm, Placement, PreNorm, RMSNorm


class Block(Config):
    """x <- residual(x, mixer); x <- residual(x, ffn), normed as `placement` says."""

    mixer: Mixer
    ffn: FeedForward | None
    norm: Norm = RMSNorm()
    placement: Placement = PreNorm()

    def build(self, dim: int, layer: int, layers: int) -> BlockLayer:
        return BlockLayer(self, dim, layer, layers)


class BlockLayer(nn.Module):
    def __init__(self, config: Block, dim: int, layer: int, layers: int) -> None:
        super().__init__()
        self.mixer = config.mixer.build(dim, layer)
        self.mixer_norms = Residual(config, dim, layers)
        self.ffn = config.ffn.build(dim) if config.ffn else None
        self.ffn_norms = Residual(config, dim, layers) if config.ffn else None

    def forward(self, x: Float[Tensor, "N D"], context: Context) -> Float[Tensor, "N D"]:
        x = self.mixer_norms(x, lambda h: self.mixer(h, context))
        if self.ffn is not None and self.ffn_norms is not None:
            x = self.ffn_norms(x, self.ffn)
        return x


class Residual(nn.Module):
    """outer(scale * x + after(f(before(x)))); a norm that the placement lacks is the identity."""

    def __init__(self, config: Block, dim: int, layers: int) -> None:
        super().__init__()
        names = config.placement.names()
        self.scale = config.placement.scale(layers)
        self.before = config.norm.build(dim) if "before" in names else nn.Identity()
        self.after = config.norm.build(dim) if "after" in names else nn.Identity()
        self.outer = config.norm.build(dim) if "outer" in names else nn.Identity()

    def forward(
        self, x: Float[Tensor, "N D"], f: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "N D"]:
        skip = x if self.scale == 1.0 else self.scale * x
        y: Tensor = self.outer(skip + self.after(f(self.before(x))))
        return y
