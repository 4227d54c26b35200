"""Keys and values in rows, one a sequence, that may keep less than all.

    keys[layer]  [rows, G, capacity, D]      what a row keeps of a layer, each head its own choice
    positions    [rows, G, capacity]         where in the text it stood

A prompt is held apart until it is read to its end; then, layer by layer, its choice moves into the
row. A row that has grown `slack` tokens over its choice is chosen from again. What is not kept is
gone: pages only count tokens here, and nothing is shared between sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.inference.cache import Cache
from treadle.inference.memory import Memory
from treadle.inference.retention import Everything, Kept, Retention
from treadle.inference.runner import Batch, Name
from treadle.kernels.attention import (
    AttentionRule,
    attention,
    attention_mask,
    attention_weights,
    visible,
)
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context
from treadle.nn.prefix import KeysValues
from treadle.peft.prefix import prefix_of

CARD = Card(
    id="inf.kv_cache.contiguous",
    paper="Pope et al. 2022, arXiv:2211.05102",
    summary="A row of keys and values for each sequence; the cache that holds learned prefixes.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --cache Contiguous",
    oracle="tests/inference/test_inference_retention.py::test_rows_equal_the_whole",
)
BLOCK = 128
"""Queries whose attention weights are in memory at once."""


class Contiguous(Cache):
    """All keys and values of a sequence in one row."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> RowMemory:
        return RowMemory(model, Everything())


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt in this pass."""

    name: Name
    start: int
    count: int
    row: int | None
    """Where its choice goes; None: it is not read to its end."""


class RowMemory(Memory):
    """Rows, and what they keep.

    Raises:
        ConfigError: the model has a learned prefix, of which not everything would be kept.
    """

    lasting = False

    def __init__(self, model: DecoderModel, retention: Retention) -> None:
        self.model, self.retention = model, retention
        self.device = model.embedding.weight.device
        prefix = prefix_of(model)
        self.prefix = 0 if prefix is None else prefix.count
        if self.prefix and not isinstance(retention, Everything):
            raise ConfigError(
                "the model has a learned prefix, which must be kept whole: use the Contiguous cache"
            )
        self.context = model.config.context - self.prefix
        self.rows: dict[Name, int] = {}
        self.free: list[int] = []
        self.lengths: list[int] = []
        """Tokens that each row keeps."""
        self.capacity = 0
        self.layers: dict[int, Kept] = {}
        self.unread: dict[Name, dict[int, Kept]] = {}
        """Prompts that are not read to their end."""

    @property
    def bytes(self) -> int:
        held = [*self.layers.values(), *(k for p in self.unread.values() for k in p.values())]
        return sum(plane.nbytes for kept in held for plane in kept.planes)

    def fork(self, name: Name, other: Name) -> None:
        source, target = self.rows[name], self._row(other)
        self.lengths[target] = self.lengths[source]
        for layer, kept in list(self.layers.items()):
            for plane in self.fit(layer, kept).planes:
                plane[target] = plane[source]

    def end(self, name: Name) -> None:
        self.unread.pop(name, None)
        row = self.rows.pop(name, None)
        if row is not None:
            self.lengths[row] = 0
            self.free.append(row)

    def arrange(self, batch: Batch) -> tuple[list[int], Context]:
        everyone = range(len(batch.starts))
        reading = [i for i in everyone if batch.names[i] not in self.rows]
        decoding = sorted(set(everyone) - set(reading), key=lambda i: self.rows[batch.names[i]])
        order = reading + decoding
        positions = [
            self.prefix + batch.starts[i] + j for i in order for j in range(batch.counts[i])
        ]
        prompts = [self._prompt(batch, i) for i in reading]
        rows = [self.rows[batch.names[i]] for i in decoding]
        slots = [self.lengths[row] for row in rows]
        crowded = []
        for row in rows:
            self.lengths[row] += 1
            size = self.retention.size(self.lengths[row])
            if self.retention.later and self.lengths[row] - size >= self.retention.slack:
                crowded.append(row)
        need = max([0, *self.lengths])
        for row in crowded:
            self.lengths[row] = self.retention.size(self.lengths[row])
        if need > self.capacity:
            self.capacity = need + 64
        tables: Mapping[int, KeysValues] = {}
        prefix = prefix_of(self.model)
        if prefix is not None and any(p.start == 0 for p in prompts):
            tables = prefix.tables(self.model)
        return order, RowPass(
            torch.tensor(positions, device=self.device),
            max(positions) + 1,
            self,
            prompts,
            torch.tensor(rows, dtype=torch.long, device=self.device),
            torch.tensor(slots, dtype=torch.long, device=self.device),
            torch.tensor(crowded, dtype=torch.long, device=self.device),
            tables,
            prefix=self.prefix,
        )

    def _prompt(self, batch: Batch, i: int) -> Prompt:
        name, start, count = batch.names[i], batch.starts[i], batch.counts[i]
        row = None
        if batch.outputs[i]:
            row = self._row(name)
            self.lengths[row] = self.retention.size(self.prefix + start + count)
        if start == 0:
            self.unread[name] = {}
        return Prompt(name, start, count, row)

    def _row(self, name: Name) -> int:
        if self.free:
            row = self.free.pop()
        else:
            row = len(self.lengths)
            self.lengths.append(0)
        self.rows[name] = row
        return row

    def fit(self, layer: int, like: Kept) -> Kept:
        """The layer's planes with room for all rows, in the dtypes that are written."""
        old = self.layers.get(layer)
        rows, capacity = len(self.lengths), self.capacity
        heads, dim, width = like.positions.shape[-2], like.keys.shape[-1], like.values.shape[-1]
        if old is not None:
            same = old.positions.shape == (rows, heads, capacity)
            if same and old.keys.dtype == like.keys.dtype:
                return old
        shapes = [(rows, heads, capacity, *d) for d in ((dim,), (width,), (), ())]
        grown = Kept(
            *(
                torch.zeros(shape, dtype=plane.dtype, device=plane.device)
                for shape, plane in zip(shapes, like.planes, strict=True)
            )
        )
        if old is not None:
            for new, plane in zip(grown.planes, old.planes, strict=True):
                new[: plane.shape[0], :, : plane.shape[2]] = plane
        self.layers[layer] = grown
        return grown


@dataclass(eq=False)
class RowPass(Context):
    """Prompts on what is held of them, then one token for each of some rows."""

    memory: RowMemory
    prompts: list[Prompt]
    rows: Int[Tensor, " B"]
    slots: Int[Tensor, " B"]
    """Where each row's new token goes."""
    crowded: Int[Tensor, " C"]
    """Rows that are chosen from again after this pass."""
    tables: Mapping[int, KeysValues]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        rule, outputs, start = self.memory.retention.rule(rule), [], 0
        for prompt in self.prompts:
            own = slice(start, start + prompt.count)
            outputs.append(self._read(prompt, layer, q[own], k[own], v[own], own, rule))
            start += prompt.count
        if len(self.rows):
            outputs.append(self._advance(layer, q[start:], k[start:], v[start:], rule))
        return torch.cat(outputs)

    def _read(
        self,
        prompt: Prompt,
        layer: int,
        q: Float[Tensor, "n H D"],
        k: Float[Tensor, "n G D"],
        v: Float[Tensor, "n G E"],
        own: slice,
        rule: AttentionRule,
    ) -> Float[Tensor, "n H E"]:
        memory, retention = self.memory, self.memory.retention
        positions = self.positions[own]
        kept = _kept(k, v, positions)
        held = memory.unread[prompt.name].get(layer)
        if held is None and layer in self.tables:
            table = self.tables[layer]
            before = torch.arange(self.prefix, device=positions.device)
            held = _kept(table.keys.to(k.dtype), table.values.to(v.dtype), before)
        if held is not None:
            kept = held.behind(kept)
        q_ = q.transpose(0, 1)[None]
        plain = held is None and rule.slopes is None
        if plain and (rule.window is None or rule.window >= len(q)):
            out = attention(q_, kept.keys[None], kept.values[None], None, rule)
        else:
            mask = attention_mask(positions[None], kept.positions[:1], rule, q.dtype)
            out = attention(q_, kept.keys[None], kept.values[None], mask, rule)
        if retention.watch:
            if not retention.follow:
                kept.scores.zero_()
            for block in range(max(0, len(q) - retention.watch), len(q), BLOCK):
                watched = slice(block, block + BLOCK)
                mask = attention_mask(positions[None, watched], kept.positions[:1], rule, q.dtype)
                weights = attention_weights(q_[:, :, watched], kept.keys[None], mask, rule)
                kept.scores += weights[0].sum(1).unflatten(0, (k.shape[1], -1)).sum(1)
        if prompt.row is not None or retention.early:
            kept = kept.choose(retention.keep(kept.scores))
        if prompt.row is None:
            memory.unread[prompt.name][layer] = kept
        else:
            memory.unread[prompt.name].pop(layer, None)
            for plane, new in zip(memory.fit(layer, kept).planes, kept.planes, strict=True):
                plane[prompt.row, :, : new.shape[1]] = new
        return out[0].transpose(0, 1).to(q.dtype)

    def _advance(
        self,
        layer: int,
        q: Float[Tensor, "B H D"],
        k: Float[Tensor, "B G D"],
        v: Float[Tensor, "B G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "B H E"]:
        retention, count, heads = self.memory.retention, len(self.rows), k.shape[1]
        positions = self.positions[-count:]
        places = positions[:, None].expand(count, heads)
        zero = torch.zeros(count, heads, 1, device=k.device)
        new = Kept(k[:, :, None], v[:, :, None], places[..., None], zero)
        planes = self.memory.fit(layer, new).planes
        for plane, part in zip(planes, new.planes, strict=True):
            plane[self.rows, :, self.slots] = part[:, :, 0]
        width = self.once("width", lambda: int(self.slots.max()) + 1)
        whole = self.once("whole", lambda: self.rows.tolist() == list(range(count)))
        keys, values, stood, _ = (
            p[:count, :, :width] if whole else p[self.rows, :, :width] for p in planes
        )
        mask = self._mask(stood, positions, rule, q.dtype)
        # The heads of a group share keys: let them be the rows of one small product.
        q_ = q.unflatten(1, (heads, -1))
        if retention.follow:
            weights = attention_weights(q_, keys, mask, rule)
            planes[3][self.rows, :, :width] += weights.sum(2)
            out = weights.to(values.dtype) @ values
        else:
            out = attention(q_, keys, values, mask, rule)
        if len(self.crowded):
            self._choose(planes)
        return out.flatten(1, 2).to(q.dtype)

    def _mask(
        self,
        stood: Int[Tensor, "B G n"],
        positions: Int[Tensor, " B"],
        rule: AttentionRule,
        dtype: torch.dtype,
    ) -> Tensor:
        """Whom the heads of a group see: `[B G 1 n]`, or with ALiBi additive `[B G H/G n]`."""
        groups = stood.shape[1]
        there = torch.arange(stood.shape[2], device=stood.device) <= self.slots[:, None]
        stood = stood.masked_fill(~there[:, None], -1)
        now = positions[:, None].expand(-1, groups).flatten()[:, None]
        seen = visible(now, stood.flatten(0, 1), rule).view(-1, groups, 1, stood.shape[2])
        if rule.slopes is None:
            return seen
        slopes = torch.tensor(rule.slopes, dtype=dtype, device=stood.device).view(groups, -1, 1)
        distance = (positions[:, None, None] - stood).to(dtype)[:, :, None]
        bias: Tensor = -slopes * distance
        return bias.masked_fill(~seen, float("-inf"))

    def _choose(self, planes: tuple[Tensor, ...]) -> None:
        retention = self.memory.retention
        size = retention.size(10**9)
        full = size + retention.slack
        crowd = Kept(*(plane[self.crowded, :, :full] for plane in planes))
        chosen = crowd.choose(retention.keep(crowd.scores))
        for plane, part in zip(planes, chosen.planes, strict=True):
            plane[self.crowded, :, :size] = part


def _kept(
    k: Float[Tensor, "n G D"], v: Float[Tensor, "n G E"], positions: Int[Tensor, " n"]
) -> Kept:
    heads, length = k.shape[1], len(positions)
    scores = torch.zeros(heads, length, device=k.device)
    return Kept(k.transpose(0, 1), v.transpose(0, 1), positions.expand(heads, length), scores)
