"""Pretraining: a corpus as rows of a fixed length, in an order that the seed fixes.

Rows are either windows of the running text, or whole documents packed by best fit; each token but
the first of the text, or of a document, is predicted exactly once an epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from pydantic import Field

from treadle.core.config import Config, digest
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble, within_budget
from treadle.data.documents import Documents
from treadle.data.order import Order, Place
from treadle.data.pack import Overlong, Span, SplitLong, pack
from treadle.data.source import Env, Source, Stream, Work
from treadle.data.tokens import TokenArray, token_array

Row = tuple[Span, ...]
"""Where the segments of a row lie in the array of tokens; they do not see each other."""


class Rows(Config):
    """A shape: how the running text is cut into rows."""

    @abstractmethod
    def __call__(self, array: TokenArray, context: int) -> Sequence[Row]:
        """Rows of at most `context` tokens."""


class Windows(Rows):
    """The running text cut evenly; a token sees what is before it in its row, documents or not."""

    def __call__(self, array: TokenArray, context: int) -> Sequence[Row]:
        return _Windows(len(array.tokens), context)


class _Windows(Sequence[Row]):
    """Neighbours share one token: the last to be predicted in one is the first seen in the next."""

    def __init__(self, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        self.starts = range(0, max(tokens - 1, 1), context - 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        start = self.starts[index]
        return ((start, min(start + self.context, self.tokens)),)


class PackedDocuments(Rows):
    """Whole documents, best fit; a token sees only its own."""

    overlong: Overlong = SplitLong()
    """What happens to documents that are longer than a row."""

    def __call__(self, array: TokenArray, context: int) -> Sequence[Row]:
        starts = np.concatenate([[0], array.ends[:-1]])
        spans = [
            (int(start) + a, int(start) + b)
            for start, end in zip(starts, array.ends, strict=True)
            for a, b in self.overlong(int(end - start), context)
            if b - a > 1  # an empty document has nothing to predict
        ]
        rows = pack([stop - start for start, stop in spans], context)
        return tuple(tuple(spans[i] for i in row) for row in rows)


class TextCorpus(Source):
    """Text to be learned token by token."""

    documents: Documents
    context: int = Field(ge=2)
    """Tokens in a row."""
    tokens_per_step: int = Field(ge=2)
    """Tokens in an optimiser step, over all ranks; at least one row a rank."""
    tokens: int = Field(8192, ge=2)
    """Most tokens in a micro-batch."""
    rows: Rows = Windows()

    def open(self, env: Env) -> CorpusStream:
        return CorpusStream(self, env)


class CorpusStream(Stream):
    """Its state is the place in the order of rows, and which corpus that is."""

    def __init__(self, config: TextCorpus, env: Env) -> None:
        self.config, self.env = config, env
        self.name = f"{digest(config.documents)}-{env.tokenizer.digest}"
        self.array = self._shared_array()
        self.cut = config.rows(self.array, config.context)
        self.order = Order(len(self.cut), env.seed)
        self.place = Place()
        self.per_step = config.tokens_per_step // config.context
        if self.per_step < env.world:
            raise TreadleError(
                f"tokens_per_step is {config.tokens_per_step}: that is {self.per_step} rows of "
                f"{config.context} for {env.world} processes; raise it to at least "
                f"{config.context * env.world}"
            )

    def _shared_array(self) -> TokenArray:
        """Made by the first process, while the others wait."""
        folder = self.env.scratch / f"tokens-{self.name}"
        together = dist.is_available() and dist.is_initialized()
        if together and self.env.rank:
            dist.barrier()
        array = token_array(folder, self._texts(), self.env.tokenizer)
        if together and not self.env.rank:
            dist.barrier()
        return array

    def _texts(self) -> Iterator[str]:
        """Not touched where the array is there already: a run keeps the corpus it began with."""
        for document in self.config.documents.training():
            yield document.text

    def __next__(self) -> Work:
        taken = self.order.take(self.place, self.per_step, rank=self.env.rank, world=self.env.world)
        epoch = self.place.epoch + self.place.position / self.order.size
        self.place = self.order.after(self.place, self.per_step)
        rows = [self.cut[i] for i in taken]
        runs = within_budget([sum(b - a for a, b in row) for row in rows], self.config.tokens)
        batches = tuple(
            assemble([self._piece(span) for i in run for span in rows[i]]) for run in runs
        )
        return Work(batches, {"epoch": epoch})

    def _piece(self, span: Span) -> Piece:
        ids = self.array.slice(*span)
        return Piece(ids, [True] * len(ids))

    def state(self) -> dict[str, Any]:
        return {"corpus": self.name, "rows": len(self.cut), **self.place.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if (state["corpus"], state["rows"]) != (self.name, len(self.cut)):
            raise TreadleError(
                "the corpus, its tokenizer or its rows have changed since this run was saved, so "
                "it cannot go on where it was; start a new run from its model"
            )
        self.place = Place.restore(state)
