"""Sources for embedding models: texts that belong together, and pairs of texts with a likeness.

The queries of a micro-batch come first, then their positives, then their hard negatives. Every
text of a micro-batch that belongs to another query is a negative, so the more of them fit into
`tokens`, the harder the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.data.labelled import Documents, TaskSource, TaskStream, by_column, extend, rated
from treadle.data.records import Matched, Rated
from treadle.data.source import Env, Stream


@dataclass(frozen=True, kw_only=True)
class MatchBatch(Batch):
    """Queries, then their candidates."""

    queries: int
    """How many documents at the front are queries; candidate i belongs to query i."""
    left_out: Bool[Tensor, "Q C"]
    """Candidates that are no negatives of a query though they are not its own: the text of its
    positive or of itself, or another positive of the same query."""


class Matches(TaskSource):
    """Queries with texts that belong to them."""

    tokens: int = Field(16_384, ge=8)
    """Most tokens in a micro-batch, within which texts are each other's negatives."""
    negatives: int = Field(0, ge=0)
    """Hard negatives of each query; a row must have as many."""

    def open(self, env: Env) -> Stream:
        examples = self.texts.open(Matched)
        for index, example in enumerate(examples):
            if len(example.negatives) < self.negatives:
                raise TreadleError(
                    f"{self.texts.path}: example {index} has {len(example.negatives)} hard "
                    f"negatives, not the {self.negatives} that `negatives` asks for"
                )
        framer = self.framer(env)

        def texts(index: int) -> tuple[str, ...]:
            example = examples[index]
            return (example.query, example.positive, *example.negatives[: self.negatives])

        def batch(indices: Sequence[int], rows: Sequence[Documents]) -> Batch:
            if len(indices) == 1 and not self.negatives:
                raise TreadleError(
                    "a query is alone in its micro-batch, without a negative to tell its text "
                    f"from: raise `tokens` above {self.tokens}, or lower `longest`"
                )
            return extend(
                MatchBatch,
                by_column(rows),
                queries=len(indices),
                left_out=left_out([texts(i) for i in indices]),
            )

        return TaskStream(
            env, self, len(examples), lambda i: tuple(framer.text(t) for t in texts(i)), batch
        )


def left_out(rows: Sequence[Sequence[str]]) -> Bool[Tensor, "Q C"]:
    """Which candidates are no negatives; a row holds query, positive, hard negatives."""
    candidates = [text for column in list(zip(*rows, strict=True))[1:] for text in column]
    found = torch.zeros(len(rows), len(candidates), dtype=torch.bool)
    for i, (query, positive, *_) in enumerate(rows):
        for j, text in enumerate(candidates):
            answers_too = j < len(rows) and rows[j][0] == query
            found[i, j] = j != i and (answers_too or text in (positive, query))
    return found


class RatedPairs(TaskSource):
    """Pairs of texts with a likeness; each text is read by itself."""

    def open(self, env: Env) -> Stream:
        examples, framer = self.texts.open(Rated), self.framer(env)

        def documents(index: int) -> Documents:
            example = examples[index]
            if example.second is None:
                raise TreadleError(
                    f"{self.texts.path}: example {index} is no pair: name the key of the second "
                    "text in RatedFormat.second"
                )
            return framer.text(example.first), framer.text(example.second)

        return rated(env, self, examples, documents)
