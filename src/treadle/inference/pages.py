"""Keys and values in pages of tokens: the store that sequences share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Pages(ABC):
    """For each layer some planes `[places, ...]`; place p of page n is `n * page + p`.

    What the planes hold of a token is the store's business. Memory is taken as pages are used:
    planes grow by doubling up to `pages`.
    """

    def __init__(self, page: int, pages: int, device: torch.device) -> None:
        self.page, self.pages, self.device = page, pages, device
        self.used = 0
        self.planes: dict[int, list[Tensor]] = {}

    @abstractmethod
    def encode(
        self, layer: int, k: Float[Tensor, "N G D"], v: Float[Tensor, "N G E"]
    ) -> list[Tensor]:
        """The planes' rows of these tokens."""

    @abstractmethod
    def decode(
        self, layer: int, planes: list[Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N G D"], Float[Tensor, "N G E"]]:
        """Keys and values of such rows."""

    @property
    def bytes(self) -> int:
        return sum(plane.nbytes for planes in self.planes.values() for plane in planes)

    def reserve(self, page: int) -> None:
        """Make room for this page, at the next write."""
        if page >= self.used:
            self.used = min(self.pages, max(page + 1, 2 * self.used))

    def write(
        self,
        layer: int,
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        places: Int[Tensor, " N"],
    ) -> None:
        """Store keys and values of tokens."""
        rows = self.encode(layer, k, v)
        for plane, row in zip(self._fit(layer, rows), rows, strict=True):
            plane.index_copy_(0, places, row)

    def read(
        self, layer: int, places: Int[Tensor, " N"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N G D"], Float[Tensor, "N G E"]]:
        """Keys and values of the tokens at these places."""
        planes = [p.index_select(0, places) for p in self.planes[layer]]
        return self.decode(layer, planes, dtype)

    def _fit(self, layer: int, like: list[Tensor]) -> list[Tensor]:
        """The layer's planes with room for the reserved pages, in the dtypes that are written."""
        size = self.used * self.page
        planes = self.planes.get(layer, [])
        known = [(p.shape[0], p.dtype) for p in planes]
        if known == [(size, t.dtype) for t in like]:
            return planes
        grown = [torch.empty(size, *t.shape[1:], dtype=t.dtype, device=t.device) for t in like]
        if planes:
            for new, old in zip(grown, planes, strict=True):
                new[: old.shape[0]] = old
        self.planes[layer] = grown
        return grown

    def span(self, page: int) -> slice:
        return slice(page * self.page, (page + 1) * self.page)

    def copy(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        self.reserve(target)
        for layer, planes in list(self.planes.items()):
            for held in self._fit(layer, planes):
                held[self.span(target)] = held[self.span(source)]

    def save(self, page: int) -> Int[Tensor, " X"]:
        """The bytes of a page, plane by plane, layer by layer."""
        planes = [plane for _, planes in sorted(self.planes.items()) for plane in planes]
        return torch.cat(
            [p[self.span(page)].contiguous().view(torch.uint8).flatten() for p in planes]
        )

    def load(self, page: int, content: Int[Tensor, " X"]) -> None:
        """Put back what `save` gave; every layer must have been written once."""
        self.reserve(page)
        at = 0
        for layer, planes in sorted(self.planes.items()):
            for plane in self._fit(layer, planes):
                held = plane[self.span(page)]
                part = content[at : at + held.nbytes].clone().view(plane.dtype)
                held.copy_(part.view(held.shape))
                at += held.nbytes


class PlainPages(Pages):
    """Keys and values as they are."""

    def encode(
        self, layer: int, k: Float[Tensor, "N G D"], v: Float[Tensor, "N G E"]
    ) -> list[Tensor]:
        return [k, v]

    def decode(
        self, layer: int, planes: list[Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N G D"], Float[Tensor, "N G E"]]:
        keys, values = planes
        return keys.to(dtype), values.to(dtype)
