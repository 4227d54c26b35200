"""A linear layer with another adapter for every token, its own product computed once for all.

    y_t = g_a * (W (f_a * x_t) + B_a A_a x_t) + c_a,      a = a(t) the adapter of token t

The factors of all adapters lie under each other, A [S R, in] and B [S R, out]. Tokens that come
one by one (decoding) take two products for all adapters together: h = X A^T reads each factor
once, and what is not of the token's own adapter is set to zero before B. A long run of tokens of
one adapter (a prompt) takes its own rows alone.

Chen et al. 2023, Punica, arXiv:2310.18547; Sheng et al. 2023, S-LoRA, arXiv:2311.03285.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of

LONG = 32
"""Tokens from which a segment is multiplied by its own factors alone."""
SPARSE = 2
"""Slots in a span for each one in use, up to which the span is read as it lies."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to a linear layer; None: nothing of that kind."""

    A: Float[Tensor, "r in"] | None = None
    B: Float[Tensor, "r out"] | None = None
    inputs: Float[Tensor, " in"] | None = None
    """f."""
    outputs: Float[Tensor, " out"] | None = None
    """g."""
    shift: Float[Tensor, " out"] | None = None
    """c."""

    @property
    def rank(self) -> int:
        return 0 if self.A is None else len(self.A)

    @property
    def nbytes(self) -> int:
        parts = (self.A, self.B, self.inputs, self.outputs, self.shift)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Part:
    """Adjacent tokens whose low-rank products are taken together."""

    rows: slice
    places: range | Int[Tensor, " k"]
    """Where the factors that are multiplied by lie in the stack: those of slot 1 at 0."""
    others: Bool[Tensor, "n k 1"] | None
    """Which of them are not the token's own; None: the one slot is that of all."""


class Route:
    """Which slot each token of the present pass belongs to; slot 0 has no adapter."""

    def __init__(self) -> None:
        self.slots: Int[Tensor, " N"] = torch.empty(0, dtype=torch.long)
        self.parts: tuple[Part, ...] = ()

    def clear(self) -> None:
        """All tokens are of the base."""
        self.parts = ()

    def set(self, segments: Sequence[tuple[int, int]], device: torch.device) -> None:
        """The pass is made of these segments: slot and number of tokens."""
        counts = torch.tensor([count for _, count in segments])
        self.slots = torch.tensor([slot for slot, _ in segments]).repeat_interleave(counts)
        parts, start = [], 0
        runs = [(slot, sum(n for _, n in run)) for slot, run in groupby(segments, lambda s: s[0])]
        for long, group in groupby(runs, lambda run: run[1] >= LONG):
            members = list(group)
            for piece in ([m] for m in members) if long else [members]:
                stop = start + sum(count for _, count in piece)
                if part := self._part(slice(start, stop), sorted({s for s, _ in piece} - {0})):
                    parts.append(part)
                start = stop
        self.slots = self.slots.to(device)
        self.parts = tuple(parts)

    def _part(self, rows: slice, used: list[int]) -> Part | None:
        if not used:
            return None
        own, places = self.slots[rows] - 1, [slot - 1 for slot in used]
        span = range(places[0], places[-1] + 1)
        if len(span) == 1 and bool((own == span[0]).all()):
            return Part(rows, span, None)
        dense = len(span) <= SPARSE * len(used)
        chosen = torch.tensor(list(span) if dense else places)
        return Part(rows, span if dense else chosen, (own[:, None] != chosen)[..., None])


class AdaptedLinear(LinearLike):
    """`base` and the changes of several adapters to it."""

    def __init__(self, base: nn.Linear | LinearLike, route: Route) -> None:
        super().__init__()
        self.base, self.route = base, route
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank = 0
        self.A = self.B = self.inputs = self.outputs = self.shift = torch.empty(0)

    def effective_weight(self) -> Float[Tensor, "out in"]:
        return weight_of(self.base)

    def effective_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        if not self.route.parts:
            y: Tensor = self.base(x)
            return y
        x, slots = x.to(compute_dtype(x)), self.route.slots
        y = self.base(x * self.inputs[slots].to(x.dtype) if len(self.inputs) else x)
        if self.rank:
            for part in self.route.parts:
                self._add(y[part.rows], x[part.rows], part)
        if len(self.outputs):
            y = y * self.outputs[slots].to(y.dtype)
        return y + self.shift[slots].to(y.dtype) if len(self.shift) else y

    def _add(self, y: Float[Tensor, "n out"], x: Float[Tensor, "n in"], part: Part) -> None:
        """Adds B A x of each token's own adapter to `y`."""
        A, B = (self._factor(t, part.places).to(x.dtype) for t in (self.A, self.B))
        h = F.linear(x, A)
        if part.others is not None:
            h = h.unflatten(1, (-1, self.rank)).masked_fill(part.others.to(h.device), 0).flatten(1)
        y.addmm_(h, B)

    def _factor(self, stacked: Tensor, places: range | Tensor) -> Float[Tensor, "kr width"]:
        if isinstance(places, range):
            return stacked[places.start * self.rank : places.stop * self.rank]
        chosen: Tensor = stacked.unflatten(0, (-1, self.rank))[places]
        return chosen.flatten(0, 1)

    def put(self, slot: int, change: Change, slots: int) -> None:
        """Slot `slot` of 0 .. slots - 1 gets this change, whatever it had before."""
        size = max(self.rank, change.rank)
        self.A = _factors(self.A, change.A, slot - 1, slots - 1, self.rank, size)
        self.B = _factors(self.B, change.B, slot - 1, slots - 1, self.rank, size)
        self.rank = size
        self.inputs = _rows(self.inputs, change.inputs, slot, slots, 1.0)
        self.outputs = _rows(self.outputs, change.outputs, slot, slots, 1.0)
        self.shift = _rows(self.shift, change.shift, slot, slots, 0.0)

    @property
    def nbytes(self) -> int:
        """Of all adapters here."""
        tables = (self.A, self.B, self.inputs, self.outputs, self.shift)
        return sum(table.nbytes for table in tables)


def _factors(
    old: Tensor, new: Tensor | None, place: int, places: int, rank: int, size: int
) -> Float[Tensor, "SR width"]:
    """`old` with `size` rows at each of `places` places, those of `place` taken from `new`."""
    if not size:
        return old
    if (size, places * size) != (rank, len(old)):
        like = old if new is None else new
        grown = like.new_zeros(places * size, like.shape[1])
        if len(old):
            held = old.unflatten(0, (-1, rank))
            grown.unflatten(0, (places, size))[: len(held), :rank] = held
        old = grown
    rows = old[place * size : (place + 1) * size].zero_()
    if new is not None:
        rows[: len(new)] = new
    return old


def _rows(
    old: Tensor, new: Tensor | None, slot: int, slots: int, neutral: float
) -> Float[Tensor, "S width"]:
    """`old` with a row for each of `slots` slots, that of `slot` taken from `new`."""
    if new is None and not len(old):
        return old
    if len(old) != slots:
        like = old if new is None else new
        grown = like.new_full((slots, like.shape[-1]), neutral)
        if len(old):
            grown[: len(old)] = old
        old = grown
    old[slot] = neutral if new is None else new
    return old
