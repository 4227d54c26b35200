"""Keys and values in pages that sequences share: the cache that all others are judged by.

One pass has three kinds of sequences, each attended in the way that is cheapest for it:

    fresh      new prompts, within themselves, as a packed training batch
    extended   several tokens after a cached beginning, on keys gathered from pages
    decoding   one token each, on contiguous rows that follow the pages
"""

from __future__ import annotations

import psutil
import torch
from jaxtyping import Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.inference.cache import Cache
from treadle.inference.memory import Memory
from treadle.inference.page_attention import Direct, PageAttention, TorchPages, padded
from treadle.inference.paged import Decoding, Extended, Pass, Shapes
from treadle.inference.pages import Pages, PlainPages
from treadle.inference.rows import Rows
from treadle.inference.runner import Batch
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import AttentionLayer
from treadle.peft.prefix import prefix_of

CARD = Card(
    id="inf.kv_cache",
    paper="Pope et al. 2022, arXiv:2211.05102; Kwon et al. 2023, PagedAttention, arXiv:2309.06180",
    summary="Paged key-value cache; decoding reads contiguous rows, rings where layers slide.",
    recipe="treadle chat smollm2-135m-instruct",
    oracle="tests/inference/test_inference_cache.py::test_cached_equals_uncached",
)


class Paged(Cache):
    """Keys and values as the model computes them, in pages."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        device = model.embedding.weight.device
        return PagedMemory(model, PlainPages(page, pages, device), Rows(page))


class Gathered(Cache):
    """The same without rows, gathered from pages at every pass: for sequences that are cut back
    more often than they grow."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        return PagedMemory(model, PlainPages(page, pages, model.embedding.weight.device), None)


class PagesOnly(Cache):
    """The same without rows: what decodes attends to pages where they lie, so that keys and values
    are in memory once."""

    attention: PageAttention = TorchPages()

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        store = PlainPages(page, pages, model.embedding.weight.device)
        self.attention.check(store)
        return PagedMemory(model, store, None, self.attention)


class PagedMemory(Memory):
    """Pages, and what tokens that decode attend by: rows in front of the pages, or the pages.
    Neither: every token sees what pages hold, those of a fresh prompt too.

    Raises:
        ConfigError: the model has a learned prefix.
    """

    lasting = True

    def __init__(
        self,
        model: DecoderModel,
        store: Pages,
        rows: Rows | None,
        attention: PageAttention | None = None,
    ) -> None:
        if prefix_of(model) is not None:
            raise ConfigError(
                "the model has a learned prefix, which pages do not hold: use the Contiguous cache"
            )
        self.store, self.rows, self.attention = store, rows, attention
        self.page, self.device, self.context = store.page, store.device, model.config.context

    @property
    def bytes(self) -> int:
        return self.store.bytes + (self.rows.bytes if self.rows is not None else 0)

    def arrange(self, batch: Batch) -> tuple[list[int], Context]:
        everyone = list(range(len(batch.starts)))
        if self.rows is None and self.attention is None:
            fresh, extended, decoding = [], everyone, []
        else:
            fresh = [i for i in everyone if batch.starts[i] == 0]
            later = [i for i in everyone if batch.starts[i] > 0]
            extended = [i for i in later if batch.counts[i] > 1]
            decoding = [i for i in later if batch.counts[i] == 1]
        self.announce(batch, fresh + extended, decoding)
        if self.rows is not None and decoding:
            rows = self.rows.assign(
                [batch.tables[i] for i in decoding], [batch.starts[i] for i in decoding]
            )
            decoding = [decoding[j] for j in rows]
        order = fresh + extended + decoding
        positions, places = self._positions(batch, order)
        longest = max(positions) + 1
        context = Pass(self._tensor(positions), longest, self.store, self._tensor(places))
        if fresh:
            layout = Layout(tuple(batch.counts[i] for i in fresh))
            context.add(Packed.of(layout, self.device), layout.tokens)
        if extended:
            part = self._extended(batch, extended)
            context.add(part, len(part.positions))
        if decoding:
            context.add(self._decoding(batch, decoding), len(decoding))
        return order, context

    def announce(self, batch: Batch, runs: list[int], decoding: list[int]) -> None:
        """Make room for the pages that are written, and forget the rows that hold old contents."""
        changed: set[int] = set()
        for i in runs:
            first, last = batch.starts[i], batch.starts[i] + batch.counts[i] - 1
            changed.update(batch.tables[i][first // self.page : last // self.page + 1])
        for i in decoding:
            at, offset = divmod(batch.starts[i], self.page)
            if offset == 0:
                changed.add(batch.tables[i][at])
        if changed:
            self.store.reserve(max(changed))
            self._stale(changed)

    def _stale(self, pages: set[int]) -> None:
        if self.rows is not None:
            self.rows.forget(pages)

    def _tensor(self, values: list[int]) -> Int[Tensor, " N"]:
        return torch.tensor(values, device=self.device)

    def _positions(self, batch: Batch, order: list[int]) -> tuple[list[int], list[int]]:
        """Of each token its position, and its place in the page store."""
        positions: list[int] = []
        places: list[int] = []
        for i in order:
            table, start = batch.tables[i], batch.starts[i]
            own = range(start, start + batch.counts[i])
            positions += own
            places += [table[p // self.page] * self.page + p % self.page for p in own]
        return positions, places

    def _extended(self, batch: Batch, members: list[int]) -> Extended:
        starts = [batch.starts[i] for i in members]
        counts = [batch.counts[i] for i in members]
        tables = [torch.tensor(batch.tables[i]) for i in members]
        positions = torch.cat(
            [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        ).to(self.device)
        longest = int(positions.max()) + 1
        return Extended(positions, longest, self.store, starts, counts, tables)

    def _decoding(self, batch: Batch, members: list[int]) -> Context:
        if self.rows is not None:
            return self._in_rows(batch, members, self.rows)
        assert self.attention is not None, "without rows somebody reads pages"
        starts = [batch.starts[i] for i in members]
        tables = padded([batch.tables[i] for i in members], starts, self.page).to(self.device)
        return Direct(self._tensor(starts), max(starts) + 1, self.store, tables, self.attention)

    def _in_rows(self, batch: Batch, members: list[int], front: Rows) -> Decoding:
        """The rows' new tokens, and the older ones that rows have yet to take over from pages."""
        rows, old, places = [], [], []
        for row, i in enumerate(members):
            table, start = batch.tables[i], batch.starts[i]
            held = front.grow(row, table, start + 1)
            if held < start:
                missing = torch.arange(held, start)
                rows.append(torch.full_like(missing, row))
                old.append(missing)
                pages = torch.tensor(table)[missing // self.page]
                places.append(pages * self.page + missing % self.page)
        positions = torch.tensor([batch.starts[i] for i in members])
        longest = int(positions.max()) + 1
        front.reserve(longest)
        behind = None
        if rows:
            behind = (
                torch.cat(rows).to(self.device),
                torch.cat(old).to(self.device),
                torch.cat(places).to(self.device),
            )
        return Decoding(positions.to(self.device), longest, self.store, front, behind)

    def copy(self, source: int, target: int) -> None:
        self.store.copy(source, target)
        self._stale({target})

    def shapes(self) -> Context | None:
        if self.store.planes:
            return None
        self.store.reserve(0)
        return Shapes(torch.zeros(1, dtype=torch.long, device=self.device), 1, self.store)

    def save(self, page: int) -> Tensor:
        return self.store.save(page)

    def load(self, page: int, content: Tensor) -> None:
        self.store.load(page, content)
        self._stale({page})


def pages_for(model: DecoderModel, slots: int, tokens: int | None, page: int = 16) -> int:
    """Pages for `tokens`; None: for full contexts in all slots, in a quarter of the memory."""
    if tokens is not None:
        return -(-tokens // page)
    layers = [m for m in model.modules() if isinstance(m, AttentionLayer)]
    size = 8 * sum(m.kv_heads * m.head_dim for m in layers)
    device = model.embedding.weight.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = psutil.virtual_memory().total
    one = -(-model.config.context // page)
    return max(one, min(slots * one, memory // 4 // (page * max(1, size))))
