"""Keys and values in pages of tokens: the store that sequences share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Pages:
    """For each layer keys and values `[places, G, D]`; place p of page n is `n * page + p`.

    Memory is taken as pages are used: tensors grow by doubling up to `pages`.
    """

    def __init__(self, page: int, pages: int, device: torch.device) -> None:
        self.page, self.pages, self.device = page, pages, device
        self.used = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def reserve(self, page: int) -> None:
        """Make room for this page, at the next write."""
        if page >= self.used:
            self.used = min(self.pages, max(page + 1, 2 * self.used))

    def fit(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """The layer's tensor with room for the reserved pages, in the dtype that is written."""
        old, size = store.get(layer), self.used * self.page
        if old is not None and old.shape[0] == size and old.dtype == like.dtype:
            return old
        shape = (size, *like.shape[1:])
        store[layer] = torch.empty(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            store[layer][: old.shape[0]] = old
        return store[layer]

    def write(
        self,
        layer: int,
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        places: Int[Tensor, " N"],
    ) -> None:
        """Store keys and values of tokens."""
        self.fit(self.keys, layer, k).index_copy_(0, places, k)
        self.fit(self.values, layer, v).index_copy_(0, places, v)

    def span(self, page: int) -> slice:
        return slice(page * self.page, (page + 1) * self.page)

    def copy(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        self.reserve(target)
        for store in (self.keys, self.values):
            for layer, tensor in list(store.items()):
                held = self.fit(store, layer, tensor)
                held[self.span(target)] = held[self.span(source)]

    def save(self, page: int) -> Float[Tensor, " X"]:
        """A page of all layers, flat: keys, then values, layer by layer."""
        stores = [t for layer in sorted(self.keys) for t in (self.keys[layer], self.values[layer])]
        return torch.cat([t[self.span(page)].flatten() for t in stores])

    def load(self, page: int, content: Float[Tensor, " X"]) -> None:
        """Put back what `save` gave; every layer must have been fitted."""
        self.reserve(page)
        at = 0
        for layer in sorted(self.keys):
            for store in (self.keys, self.values):
                held = self.fit(store, layer, store[layer])[self.span(page)]
                held.copy_(content[at : at + held.numel()].view(held.shape))
                at += held.numel()
