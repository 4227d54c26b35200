"""A prefix: keys and values at positions before the first token, given and not computed.

    softmax(q [P_k; K]^T) [P_v; V],     tokens at positions n, n + 1, ...  behind n of the prefix

Documents of a batch share one prefix: it is a segment of which all their roots are children. A
context with a cache holds the prefix in its cache, and says so in `Context.prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.kernels.attention import AttentionRule
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout


@dataclass(frozen=True)
class KeysValues:
    """What one attention layer sees of a prefix; keys are rotated to positions 0 ... n - 1."""

    keys: Float[Tensor, "n G D"]
    values: Float[Tensor, "n G E"]


@dataclass(eq=False)
class Prefixed(Context):
    """The tokens of a packed context behind a prefix."""

    packed: Packed
    tables: Mapping[int, KeysValues]
    """By layer."""

    @staticmethod
    def of(context: Packed, count: int, tables: Mapping[int, KeysValues]) -> Prefixed:
        inner, device = context.layout, context.positions.device
        parents = inner.parents or (-1,) * len(inner.lengths)
        layout = Layout((count, *inner.lengths), (-1, *(p + 1 for p in parents)))
        packed = Packed.of(layout, device)
        return Prefixed(
            packed.positions[count:],
            packed.length,
            packed,
            tables,
            prefix=count,
            types=context.types,
        )

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        n, table = self.prefix, self.tables[layer]
        q = torch.cat([q.new_zeros(n, *q.shape[1:]), q])  # the prefix asks nothing
        k = torch.cat([table.keys.to(k.dtype), k])
        v = torch.cat([table.values.to(v.dtype), v])
        return self.packed.attend(layer, q, k, v, rule)[n:]


@dataclass(eq=False)
class Recorded(Context):
    """A packed context that remembers the keys and values of its tokens, as a prefix of others."""

    packed: Packed
    tables: dict[int, KeysValues] = field(default_factory=dict)

    @staticmethod
    def of(count: int, device: torch.device) -> Recorded:
        packed = Packed.of(Layout((count,)), device)
        return Recorded(packed.positions, packed.length, packed, prefix=count)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.tables[layer] = KeysValues(k, v)
        return self.packed.attend(layer, q, k, v, rule)
