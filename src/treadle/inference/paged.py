"""Contexts of one pass over paged keys and values: how each kind of sequence attends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.inference.pages import Pages
from treadle.inference.rows import Rows
from treadle.kernels.attention import AttentionRule, attention, attention_mask
from treadle.nn.context import Context

WASTE = 1.25
"""Extended sequences share a padded batch while the longest has at most this times their tokens."""


@dataclass(eq=False)
class Pass(Context):
    """Writes the new keys and values to their pages, then lets each part attend its tokens."""

    store: Pages
    places: Int[Tensor, " N"]
    parts: list[tuple[Context, int]] = field(default_factory=list)

    def add(self, part: Context, tokens: int) -> None:
        """The next `tokens` of the flat batch attend by `part`."""
        self.parts.append((part, tokens))

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.store.write(layer, k, v, self.places)
        if len(self.parts) == 1:
            return self.parts[0][0].attend(layer, q, k, v, rule)
        outputs, start = [], 0
        for part, tokens in self.parts:
            own = slice(start, start + tokens)
            outputs.append(part.attend(layer, q[own], k[own], v[own], rule))
            start += tokens
        return torch.cat(outputs)


@dataclass(eq=False)
class Shapes(Context):
    """Attends nothing, but makes each layer's place in the store."""

    store: Pages

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.store.write(layer, k, v, torch.zeros_like(self.positions))
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


@dataclass(frozen=True)
class _Gathered:
    """One padded batch: flat queries `[B Q]` (-1 is padding), places `[B K]`, mask, kept rows."""

    queries: Int[Tensor, "B Q"]
    places: Int[Tensor, "B K"]
    mask: Tensor
    kept: Int[Tensor, " M"]
    tokens: Int[Tensor, " M"]


@dataclass(eq=False)
class Extended(Context):
    """Several new tokens for sequences whose beginnings lie in pages."""

    store: Pages
    starts: list[int]
    counts: list[int]
    tables: list[Int[Tensor, " P"]]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        for part in self.once(rule, lambda: self._gather(rule, q.dtype)):
            rows = len(part.queries)
            q_ = q[part.queries.clamp(min=0)].transpose(1, 2)
            held = self.store.read(layer, part.places.flatten(), q.dtype)
            k_, v_ = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in held)
            found = attention(q_, k_, v_, part.mask, rule)
            out[part.tokens] = found.transpose(1, 2).flatten(0, 1)[part.kept].to(q.dtype)
        return out

    def _gather(self, rule: AttentionRule, dtype: torch.dtype) -> list[_Gathered]:
        order = sorted(range(len(self.starts)), key=lambda i: (-self.counts[i], -self._end(i)))
        groups: list[list[int]] = []
        for i in order:
            first = groups[-1][0] if groups else i
            near = self.counts[first] <= WASTE * self.counts[i]
            near = near and self._end(first) <= WASTE * self._end(i) <= WASTE**2 * self._end(first)
            if groups and near:
                groups[-1].append(i)
            else:
                groups.append([i])
        return [self._group(group, rule, dtype) for group in groups]

    def _end(self, i: int) -> int:
        return self.starts[i] + self.counts[i]

    def _group(self, group: list[int], rule: AttentionRule, dtype: torch.dtype) -> _Gathered:
        device, page = self.positions.device, self.store.page
        firsts = torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)
        # What lies before the first query's window no query sees.
        lows = [max(0, self.starts[i] - rule.window + 1) if rule.window else 0 for i in group]
        width = max(self.counts[i] for i in group)
        height = max(self._end(i) - low for i, low in zip(group, lows, strict=True))
        queries = torch.full((len(group), width), -1)
        k_positions = torch.full((len(group), height), -1)
        places = torch.zeros(len(group), height, dtype=torch.long)
        for row, (i, low) in enumerate(zip(group, lows, strict=True)):
            queries[row, : self.counts[i]] = firsts[i] + torch.arange(self.counts[i])
            held = torch.arange(low, self._end(i))
            k_positions[row, : len(held)] = held
            places[row, : len(held)] = self.tables[i][held // page] * page + held % page
            # Padding reads what is written for certain: masked garbage could still be NaN.
            places[row, len(held) :] = places[row, 0]
        queries, k_positions = queries.to(device), k_positions.to(device)
        q_positions = self.positions[queries.clamp(min=0)].masked_fill(queries < 0, -1)
        kept = (queries.flatten() >= 0).nonzero().flatten()
        mask = attention_mask(q_positions, k_positions, rule, dtype)
        return _Gathered(queries, places.to(device), mask, kept, queries.flatten()[kept])


@dataclass(eq=False)
class Decoding(Context):
    """One new token for each of the sequences in rows 0..B-1."""

    store: Pages
    rows: Rows
    behind: tuple[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, " M"]] | None
    """Rows, positions and places of tokens that are in pages but not yet in rows."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B H D"],
        k: Float[Tensor, "B G D"],
        v: Float[Tensor, "B G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "B H E"]:
        count, window = len(self.positions), rule.window
        own = self.once("rows", lambda: torch.arange(count, device=q.device))
        if self.behind is not None:
            rows, positions, places = self.once(("behind", window), lambda: self._kept(window))
            old_k, old_v = self.store.read(layer, places, k.dtype)
            self.rows.write(layer, old_k, old_v, rows, positions, window)
        self.rows.write(layer, k, v, own, self.positions, window)
        mask = self.once((rule, q.dtype), lambda: self._mask(rule, q.dtype))
        width = mask.shape[-1]
        keys = self.rows.keys[layer][:count, :, :width].to(q.dtype)
        values = self.rows.values[layer][:count, :, :width].to(q.dtype)
        groups = q.shape[1] // keys.shape[1]
        if groups > 1 and rule.slopes is None and rule.softcap is None:
            # The heads of a group share keys: let them be the rows of one small product.
            out = attention(q.unflatten(1, (-1, groups)), keys, values, mask, rule)
            return out.flatten(1, 2)
        return attention(q[:, :, None], keys, values, mask, rule)[:, :, 0]

    def _kept(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens that rows lack, those that a ring of this window still holds."""
        assert self.behind is not None
        rows, positions, places = self.behind
        keep = self.positions[rows] - positions < self.rows.ring(window)
        return rows[keep], positions[keep], places[keep]

    def _mask(self, rule: AttentionRule, dtype: torch.dtype) -> Tensor:
        held = self.rows.held(self.positions + 1, self.length, rule.window)
        return attention_mask(self.positions[:, None], held, rule, dtype)
