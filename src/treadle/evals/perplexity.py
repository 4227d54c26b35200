"""Perplexity: how well the model foretells a text.

    exp(-sum log p / n),   n: words, bytes or tokens

Documents longer than the model's context roll through windows: every token is predicted once,
with at least `overlap` tokens before it in its window (the first of a document after BOS or EOS).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.results import Figure
from treadle.evals.likelihood import Scored, log_likelihoods, packs, prefix_token
from treadle.evals.rows import Examples, Row
from treadle.evals.statistics import bits, ratio
from treadle.evals.task import Benchmark, Done, Item, Record, Subject


@dataclass(frozen=True)
class DocumentItem(Item):
    """A text to foretell, and the length by which its surprise is divided."""

    text: str
    words: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """A text, and the one whose words and bytes are counted: they differ where it was cleaned."""

    text: str
    counted: str
    group: str = ""


class Perplexity(Benchmark):
    """A shape: documents to foretell."""

    rows: Examples
    window: int | None = Field(None, ge=2)
    """Tokens that the model sees at once; None: its whole context."""
    overlap: int = Field(1, ge=1)
    """Tokens of a window that repeat the one before, as context of the first predicted."""

    @abstractmethod
    def documents(self, rows: Iterable[Row]) -> Sequence[Document]:
        """What the rows hold."""

    def items(self) -> Sequence[DocumentItem]:
        documents = self.documents(self.rows.open())
        return [
            DocumentItem(index, d.group, d.text, count_words(d.counted), len(d.counted.encode()))
            for index, d in enumerate(documents[: self.limit])
        ]

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, DocumentItem)]
        context = subject.model.config.context
        size = min(self.window or context, context)
        if self.overlap > size:
            raise TreadleError(
                f"task `{self.name}`: overlap={self.overlap} exceeds the window of {size} tokens: "
                "lower it"
            )
        first = prefix_token(subject.tokenizer)
        documents = subject.tokenizer.encode_batch([item.text for item in asked])
        rolled = [list(windows(first, ids, size, self.overlap)) for ids in documents]
        places = [(d, w) for d, pieces in enumerate(rolled) for w in range(len(pieces))]
        left = [len(pieces) for pieces in rolled]
        for item in (asked[d] for d, count in enumerate(left) if not count):
            done(item, _record(item, 0.0, 0))
        sums = [0.0] * len(rolled)
        for pack in packs([[rolled[d][w]] for d, w in places], subject.tokens):
            with subject.autocast():
                found = log_likelihoods(
                    subject.model, [rolled[d][w] for d, w in (places[p] for p in pack)]
                )
            for place, value in zip(pack, found, strict=True):
                d = places[place][0]
                sums[d] += value
                left[d] -= 1
                if left[d] == 0:
                    done(asked[d], _record(asked[d], sums[d], len(documents[d])))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        surprise = [-r.metrics["log_likelihood"] for r in records]
        by = {unit: [r.metrics[unit] for r in records] for unit in ("words", "bytes", "tokens")}
        return {
            "word_perplexity": ratio(surprise, by["words"], np.exp, "perplexity"),
            "byte_perplexity": ratio(surprise, by["bytes"], np.exp, "perplexity"),
            "bits_per_byte": ratio(surprise, by["bytes"], bits, "bits/byte"),
            "token_perplexity": ratio(surprise, by["tokens"], np.exp, "perplexity"),
        }


def windows(first: int, tokens: Sequence[int], size: int, overlap: int) -> Iterator[Scored]:
    """Windows of at most `size` read tokens; their scored tokens cover `tokens` exactly once."""
    done = min(size, len(tokens))
    if done:
        yield Scored((first, *tokens[:done]), 1)
    while done < len(tokens):
        stop = min(len(tokens), done + size - overlap + 1)
        start = max(0, stop - size - 1)
        yield Scored(tuple(tokens[start:stop]), done - start)
        done = stop


def count_words(text: str) -> int:
    """Pieces between runs of white space; empty ones at either end count, as is the custom."""
    return len(re.split(r"\s+", text))


def _record(item: DocumentItem, log_likelihood: float, tokens: int) -> Record:
    metrics = {"log_likelihood": log_likelihood, "words": item.words, "bytes": item.bytes}
    return Record({}, {**metrics, "tokens": tokens})
