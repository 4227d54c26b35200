"""Context: what a layer may know about its tokens besides their vectors.

A mixer asks the context to attend; whether the keys come from the same flat batch (training) or
from a cache (generation) is the context's business, so one model serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.kernels.attention import AttentionRule, attention, attention_mask
from treadle.nn.layout import Bucket, Layout

T = TypeVar("T")


@dataclass(eq=False)
class Context(ABC):
    """Positions of the flat tokens, and a place to keep what layers share within one pass."""

    positions: Int[Tensor, " N"]
    length: int
    """Longest position in sight plus one; length-dependent RoPE scalings need it."""
    prefix: int = field(default=0, kw_only=True)
    """Positions before the tokens of every sequence whose keys and values this context holds
    already, from a learned prefix."""
    types: Int[Tensor, " N"] | None = field(default=None, kw_only=True)
    """Which part of its text each token belongs to, for models that tell them apart; None: the
    first."""
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()` at the first layer that asks, the same value for all others."""
        if torch.compiler.is_compiling():  # which cannot hash a Config, and fuses what is repeated
            return compute()
        if key not in self._shared:
            self._shared[key] = compute()
        value: T = self._shared[key]
        return value

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        """Attention output for each of the N tokens."""


@dataclass(eq=False)
class Packed(Context):
    """Tokens laid out by a `Layout`, attended within themselves; nothing is remembered."""

    layout: Layout

    @staticmethod
    def of(
        layout: Layout,
        device: torch.device | str = "cpu",
        types: Int[Tensor, " N"] | None = None,
    ) -> Packed:
        positions = layout.positions.to(device)
        return Packed(positions, int(layout.positions.max()) + 1, layout, types=types)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        outputs, places = [], []
        for index, bucket in enumerate(self.layout.buckets):
            rows, width = bucket.queries.shape
            plain = rule.window is None or rule.window >= width
            if bucket.offset >= 0 and plain and rule.slopes is None:
                start, stop = bucket.offset, bucket.offset + rows * width
                q_, k_, v_ = (
                    t[start:stop].unflatten(0, (rows, width)).transpose(1, 2) for t in (q, k, v)
                )
                out = attention(q_, k_, v_, None, rule).transpose(1, 2).flatten(0, 1)
                place = torch.arange(start, stop, device=q.device)
            else:
                use = self.once((index, rule), lambda b=bucket: self._indices(b, rule, q.dtype))  # type: ignore[misc]
                q_ = q.index_select(0, use.queries).unflatten(0, (rows, width)).transpose(1, 2)
                k_, v_ = (
                    t.index_select(0, use.keys).unflatten(0, (rows, -1)).transpose(1, 2)
                    for t in (k, v)
                )
                out = attention(q_, k_, v_, use.mask, rule).transpose(1, 2).flatten(0, 1)
                out, place = out.index_select(0, use.kept), use.places
            outputs.append(out)
            places.append(place)
        if len(outputs) == 1 and self.layout.buckets[0].offset == 0:
            return outputs[0]
        order = self.once("order", lambda: torch.argsort(torch.cat(places)))
        return torch.cat(outputs).index_select(0, order)

    def _indices(self, bucket: Bucket, rule: AttentionRule, dtype: torch.dtype) -> _Indices:
        device = self.positions.device
        queries, keys = bucket.queries.to(device), bucket.keys.to(device)
        q_positions = self.positions[queries.clamp(min=0)].masked_fill(queries < 0, -1)
        k_positions = self.positions[keys.clamp(min=0)].masked_fill(keys < 0, -1)
        kept = (queries.flatten() >= 0).nonzero().flatten()
        return _Indices(
            queries=queries.clamp(min=0).flatten(),
            keys=keys.clamp(min=0).flatten(),
            mask=attention_mask(q_positions, k_positions, rule, dtype),
            kept=kept,
            places=queries.flatten()[kept],
        )


@dataclass(frozen=True)
class _Indices:
    queries: Int[Tensor, " BQ"]
    keys: Int[Tensor, " BK"]
    mask: Tensor
    kept: Int[Tensor, " M"]
    places: Int[Tensor, " M"]
