"""How tokens that are written one a sequence attend to keys and values in pages: a shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.inference.pages import Pages, PlainPages
from treadle.kernels.attention import AttentionRule
from treadle.kernels.paged_attention import Seen, Where, one_token, seen
from treadle.nn.context import Context

Once = Callable[[Hashable, Callable[[], Seen]], Seen]


class PageAttention(Config):
    """A shape: who reads the pages."""

    @abstractmethod
    def check(self, store: Pages) -> None:
        """Raise ConfigError where it cannot read this store, on its device."""

    @abstractmethod
    def attend(
        self,
        store: Pages,
        layer: int,
        q: Float[Tensor, "B H D"],
        where: Where,
        rule: AttentionRule,
        once: Once,
    ) -> Float[Tensor, "B H E"]:
        """What each sequence's new token sees; `once` shares what layers have in common."""


class TorchPages(PageAttention):
    """Torch's operators: pages are gathered, then attended. Any store, any device."""

    def check(self, store: Pages) -> None:
        return

    def attend(
        self,
        store: Pages,
        layer: int,
        q: Float[Tensor, "B H D"],
        where: Where,
        rule: AttentionRule,
        once: Once,
    ) -> Float[Tensor, "B H E"]:
        found = once((rule, q.dtype), lambda: seen(where, rule, q.dtype))
        held = store.read(layer, found.places.flatten(), q.dtype)
        k, v = (t.unflatten(0, found.places.shape).transpose(1, 2) for t in held)
        return one_token(q, k, v, found.mask, rule)


class TritonPages(PageAttention):
    """A Triton kernel that reads keys and values where they lie, for GPUs."""

    def check(self, store: Pages) -> None:
        if not isinstance(store, PlainPages):
            raise ConfigError(
                "TritonPages reads keys and values as the model computes them: take the cache "
                "PagesOnly, or TorchPages"
            )
        if find_spec("triton") is None:
            raise ConfigError(
                "TritonPages needs `triton`, which is not installed: pip install 'treadle[gpu]', "
                "or take TorchPages"
            )
        from treadle.kernels.gpu.device import interpreted

        if store.device.type != "cuda" and not interpreted():
            raise ConfigError(
                f"TritonPages runs on a GPU, and the model is on {store.device}: take TorchPages"
            )

    def attend(
        self,
        store: Pages,
        layer: int,
        q: Float[Tensor, "B H D"],
        where: Where,
        rule: AttentionRule,
        once: Once,
    ) -> Float[Tensor, "B H E"]:
        from treadle.kernels.gpu.paged_attention import paged_attention

        keys, values = store.planes[layer]
        return paged_attention(q, keys, values, where, rule)


@dataclass(eq=False)
class Direct(Context):
    """One new token for each of some sequences, on pages that hold it already."""

    store: Pages
    tables: Int[Tensor, "B W"]
    """Pages of each, padded with any of its own."""
    attention: PageAttention

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B H D"],
        k: Float[Tensor, "B G D"],
        v: Float[Tensor, "B G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "B H E"]:
        where = Where(self.store.page, self.tables, self.positions)
        return self.attention.attend(self.store, layer, q, where, rule, self.once)


def padded(tables: list[list[int]], starts: list[int], page: int, width: int = 0) -> Tensor:
    """Tables of sequences whose new tokens stand at `starts`, as wide as the longest needs."""
    needed = [start // page + 1 for start in starts]
    width = max(width, *needed)
    return torch.tensor([t[:n] + t[:1] * (width - n) for t, n in zip(tables, needed, strict=True)])
