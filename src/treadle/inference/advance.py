"""A pass of one token a sequence over tensors that stay where they are, to be compiled or recorded.

    inputs[b] = token, position, place, owner, pages ...        b = 0 .. rows - 1

Rows and the width of the page tables are rounded up to powers of two, so that a few shapes serve
every batch. Rows without a sequence repeat the first: they write what it writes (`owner` says whose
keys), and nobody reads their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.inference.page_attention import PageAttention, TorchPages, padded
from treadle.inference.paged_memory import PagedMemory
from treadle.inference.pages import Pages
from treadle.inference.runner import Batch
from treadle.kernels.attention import AttentionRule
from treadle.kernels.paged_attention import Where
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context
from treadle.nn.mixers.attention import AttentionLayer
from treadle.nn.rope import RoPE

HEAD = 4
"""Columns before the pages."""
NARROWEST = 8
"""Pages in the narrowest table."""

Autocast = Callable[[], AbstractContextManager[object]]
Forward = Callable[[Tensor], Tensor]
Ready = Callable[[], Tensor]
Prepare = Callable[[Forward, Tensor], Ready]
"""Makes a function fast for one tensor of inputs, whose contents will change in place."""


@dataclass(eq=False)
class Steady(Context):
    """Writes to planes that have room already, then attends to them."""

    store: Pages
    tables: Int[Tensor, "B W"]
    places: Int[Tensor, " B"]
    owners: Int[Tensor, " B"]
    attention: PageAttention

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B H D"],
        k: Float[Tensor, "B G D"],
        v: Float[Tensor, "B G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "B H E"]:
        rows = self.store.encode(layer, k[self.owners], v[self.owners])
        for plane, row in zip(self.store.planes[layer], rows, strict=True):
            plane.index_copy_(0, self.places, row)
        where = Where(self.store.page, self.tables, self.positions)
        return self.attention.attend(self.store, layer, q, where, rule, self.once)


class Frame:
    """The inputs of one shape of pass, and the pass itself."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows, self.width = rows, width
        self.host = torch.zeros(
            rows, HEAD + width, dtype=torch.long, pin_memory=device.type == "cuda"
        )
        self.inputs = self.host if device.type == "cpu" else self.host.to(device)
        self.run: Ready | None = None

    def fill(self, batch: Batch, page: int) -> None:
        """Lay out a batch; what the pass before read from `host` is on the device by now, since
        its tokens were drawn."""
        starts = batch.starts
        tables = padded(batch.tables, starts, page, self.width)
        rows = [
            [token, start, table[start // page] * page + start % page, row]
            for row, (token, start, table) in enumerate(
                zip(batch.tokens, starts, batch.tables, strict=True)
            )
        ]
        count = len(rows)
        self.host[:count, :HEAD] = torch.tensor(rows)
        self.host[:count, HEAD:] = tables
        self.host[count:] = self.host[0]
        if self.inputs is not self.host:
            self.inputs.copy_(self.host, non_blocking=True)


class Advance:
    """Runs batches in which every sequence has one new token behind others.

    Takes all pages at once: what is compiled knows their number, what is recorded their addresses.

    Raises:
        ConfigError: the model's rotation depends on the longest text of the batch.
    """

    def __init__(
        self,
        model: DecoderModel,
        memory: PagedMemory,
        autocast: Autocast,
        prepare: Prepare,
    ) -> None:
        _check_rotation(model)
        self.model, self.memory, self.autocast, self.prepare = model, memory, autocast, prepare
        self.attention = memory.attention or TorchPages()
        self.attention.check(memory.store)
        memory.store.reserve(memory.store.pages - 1)
        self.frames: dict[tuple[int, int], Frame] = {}
        self.addresses: tuple[int, ...] = ()
        self.doubt = True
        """Whether weights may lie elsewhere than when the frames were made."""

    def takes(self, batch: Batch) -> bool:
        """Whether all that the batch asks for is one more token, by the model itself."""
        plain = set(batch.counts) == set(batch.outputs) == {1} and not any(batch.adapters)
        return plain and min(batch.starts) > 0

    def __call__(self, batch: Batch) -> Float[Tensor, "N V"]:
        memory, count = self.memory, len(batch.starts)
        memory.announce(batch, [], list(range(count)))
        if self.doubt:
            self._look_again()
        pages = max(start // memory.page + 1 for start in batch.starts)
        frame = self._frame(_power(count), max(NARROWEST, _power(pages)))
        frame.fill(batch, memory.page)
        with self.autocast():
            if frame.run is None:
                frame.run = self.prepare(self.forward, frame.inputs)
            return frame.run()[:count].clone()

    def forget(self) -> None:
        """The weights have changed. In place: nothing is lost; elsewhere: all is made anew."""
        self.doubt = True

    def forward(self, inputs: Int[Tensor, "B X"]) -> Float[Tensor, "B V"]:
        """Logits behind the tokens in `inputs`."""
        tokens, positions, places, owners = inputs[:, :HEAD].unbind(1)
        context = Steady(
            positions, 1, self.memory.store, inputs[:, HEAD:], places, owners, self.attention
        )
        return self.model.logits(self.model(tokens, context)).float()

    def _frame(self, rows: int, width: int) -> Frame:
        if (rows, width) not in self.frames:
            self.frames[rows, width] = Frame(rows, width, self.memory.device)
        return self.frames[rows, width]

    def _look_again(self) -> None:
        planes = (p for planes in self.memory.store.planes.values() for p in planes)
        tensors = (*self.model.parameters(), *self.model.buffers(), *planes)
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self.addresses:
            self.frames.clear()
        self.addresses, self.doubt = addresses, False


def _power(count: int) -> int:
    """The power of two that is not below."""
    return 1 << (count - 1).bit_length()


def _check_rotation(model: DecoderModel) -> None:
    for layer in model.modules():
        if not isinstance(layer, AttentionLayer):
            continue
        rope = layer.config.positions
        if not isinstance(rope, RoPE):
            continue
        half = int(layer.head_dim * rope.fraction) // 2
        base = rope.theta ** (-torch.arange(half) / half)
        short, long = (
            rope.scaling(base, rope.theta, length) for length in (1, model.config.context)
        )
        if short.attention != long.attention or not torch.equal(short.inverse, long.inverse):
            raise ConfigError(
                f"{type(rope.scaling).__name__} rotates by the longest text of a batch, which a "
                "compiled or recorded pass does not know: take --decode Eager"
            )
