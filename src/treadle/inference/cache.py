"""The key-value cache: contiguous, one slot a sequence, a ring where the layer has a window.

Keys and values of layer l lie in `[slots, G, capacity, D]`. Sequences in use occupy slots
0..B-1, so that a decoding step reads a view and gathers nothing. Position p is stored at
p mod R, with R the window of a sliding layer or the capacity; which position an entry holds
follows from the sequence's length, so attention needs no bookkeeping of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.kernels.attention import AttentionRule, attention, attention_mask
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import AttentionLayer

CARD = Card(
    id="inf.kv_cache",
    paper="Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv:2211.05102",
    summary="Contiguous key-value cache; layers with a sliding window keep a ring of that size.",
    recipe="treadle chat smollm2-135m-instruct",
    oracle="tests/inference/test_inference_cache.py::test_cached_equals_uncached",
)


class KVCache:
    """Keys and values of up to `slots` sequences; grows as sequences do."""

    def __init__(self, model: DecoderModel, slots: int) -> None:
        self.layers = {m.layer: m for m in model.modules() if isinstance(m, AttentionLayer)}
        self.slots, self.capacity = slots, 0
        self.lengths: list[int] = [0] * slots
        self.device = model.embedding.weight.device
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of up to `capacity` tokens, at the next write."""
        if capacity > self.capacity:
            self.capacity = max(capacity, min(2 * self.capacity, capacity + 1024))

    def ring(self, layer: int) -> int:
        """How many positions a slot of this layer holds."""
        window = self.layers[layer].rule.window
        return min(self.capacity, window) if window else self.capacity

    def _fit(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """The layer's tensor with room for `ring` positions, in the dtype that is written."""
        old, size = store.get(layer), self.ring(layer)
        if old is not None and old.shape[2] == size and old.dtype == like.dtype:
            return old
        shape = (self.slots, like.shape[1], size, like.shape[2])
        store[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            # A ring grows only while it has not wrapped, so places stay valid.
            store[layer][:, :, : old.shape[2]] = old
        return store[layer]

    def copy(self, source: int, targets: list[int]) -> None:
        """Give `targets` the contents of slot `source`."""
        length = self.lengths[source]
        for target in targets:
            self.lengths[target] = length
        for store in (*self.keys.values(), *self.values.values()):
            used = min(length, store.shape[2])
            for target in targets:
                store[target, :, :used] = store[source, :, :used]

    def write(
        self,
        layer: int,
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G D"],
        slots: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
    ) -> None:
        """Store keys and values of tokens; of those that share a place the last must be kept."""
        places = positions % self.ring(layer)
        self._fit(self.keys, layer, k)[slots, :, places] = k
        self._fit(self.values, layer, v)[slots, :, places] = v

    def held(self, layer: int, lengths: Int[Tensor, " B"], width: int) -> Int[Tensor, "B L"]:
        """Position that each of the first `width` places of a slot holds, or -1."""
        ring = self.ring(layer)
        place = torch.arange(min(width, ring), device=self.device)
        last = lengths[:, None] - 1
        position = last - (last - place) % ring
        return position.clamp(min=-1)


@dataclass(eq=False)
class Prefill(Context):
    """New prompts: attended within themselves like a training batch, and written to the cache."""

    packed: Packed
    cache: KVCache
    token_slots: Int[Tensor, " N"]

    @staticmethod
    def of(cache: KVCache, slots: list[int], lengths: list[int]) -> Prefill:
        packed = Packed.of(Layout(tuple(lengths)), cache.device)
        cache.reserve(packed.length)
        for slot, length in zip(slots, lengths, strict=True):
            cache.lengths[slot] = length
        token_slots = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        return Prefill(packed.positions, packed.length, packed, cache, token_slots.to(cache.device))

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        ring = self.cache.ring(layer)
        keep = self.once(("keep", ring), lambda: self._last(ring))
        if keep is None:
            self.cache.write(layer, k, v, self.token_slots, self.positions)
        else:
            self.cache.write(layer, k[keep], v[keep], self.token_slots[keep], self.positions[keep])
        return self.packed.attend(layer, q, k, v, rule)

    def _last(self, ring: int) -> Int[Tensor, " M"] | None:
        """Tokens among the last `ring` of their prompt; None if that is all of them."""
        lengths = torch.tensor(self.packed.layout.lengths, device=self.positions.device)
        if int(lengths.max()) <= ring:
            return None
        ends = lengths.repeat_interleave(lengths)
        return (self.positions >= ends - ring).nonzero().flatten()


@dataclass(eq=False)
class Decode(Context):
    """One new token for each of the sequences in slots 0..B-1."""

    cache: KVCache
    slots: Int[Tensor, " B"]

    @staticmethod
    def of(cache: KVCache, rows: int) -> Decode:
        positions = torch.tensor(cache.lengths[:rows])
        longest = int(positions.max()) + 1
        cache.reserve(longest)
        for slot in range(rows):
            cache.lengths[slot] += 1
        device = cache.device
        return Decode(positions.to(device), longest, cache, torch.arange(rows, device=device))

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.cache.write(layer, k, v, self.slots, self.positions)
        rows = len(self.slots)
        mask = self.once((rule, self.cache.ring(layer)), lambda: self._mask(layer, rule, q.dtype))
        width = mask.shape[-1]
        keys = self.cache.keys[layer][:rows, :, :width].to(q.dtype)
        values = self.cache.values[layer][:rows, :, :width].to(q.dtype)
        groups = q.shape[1] // keys.shape[1]
        if groups > 1 and rule.slopes is None and rule.softcap is None:
            # The heads of a group share keys: let them be the rows of one small product.
            q_ = q.unflatten(1, (-1, groups))
            out = attention(q_, keys, values, mask, rule)
            return out.flatten(1, 2)
        return attention(q[:, :, None], keys, values, mask, rule)[:, :, 0]

    def _mask(self, layer: int, rule: AttentionRule, dtype: torch.dtype) -> Tensor:
        held = self.cache.held(layer, self.positions + 1, self.length)
        return attention_mask(self.positions[:, None], held, rule, dtype)
