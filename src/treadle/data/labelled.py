"""Sources of labelled texts: classes, word labels and grades, each example a document.

The labels are those of the model's head, and every example is held against them before training
begins. Where classes are rare, `Balanced` weighs each example by n / (K n_c), so that all K
classes count alike (King and Zeng 2001).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, within_budget
from treadle.data.formats import Format
from treadle.data.framing import Framed, Framer, laid
from treadle.data.order import Order, Place
from treadle.data.records import Classified, Matched, Rated, Tagged
from treadle.data.source import Env, Source, Stream, Work
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Records, open_records
from treadle.models.heads import label_number, task_head

R = TypeVar("R", Classified, Tagged, Rated, Matched)
B = TypeVar("B", bound=Batch)
KINDS = MappingProxyType({k.__name__: k for k in (Classified, Tagged, Rated, Matched)})
Documents = tuple[Framed, ...]
"""Of one example."""


class TaskFiles(Config):
    """Examples out of a file, a folder or a data set."""

    path: str = Field(min_length=1)
    format: Format
    """What a row means: ClassFormat, TagFormat, RatedFormat, MatchFormat, with their keys."""
    held_out: bool = False
    """Take the validation part instead of the training part."""
    parts: LeakFreeSplit = LeakFreeSplit(validation=0.1, test=0)

    def open(self, kind: type[R]) -> list[R]:
        """The examples of the part.

        Raises:
            FileFormatError: a row is not of the format.
            TreadleError: there is no example, or they are of another kind.
        """
        found = _records(self, kind.__name__)[Part.VALIDATION if self.held_out else Part.TRAIN]
        if not len(found):
            part = "validation" if self.held_out else "training"
            raise TreadleError(f"{self.path}: no example is in the {part} part; change `parts`")
        records = (found[i] for i in range(len(found)))
        return [record for record in records if isinstance(record, kind)]


@lru_cache(maxsize=8)
def _records(files: TaskFiles, kind: str) -> dict[Part, Records]:
    return open_records(files.path, files.format, KINDS[kind], split="train", parts=files.parts)


class Balance(Config):
    """A shape: how much an example of each class weighs."""

    @abstractmethod
    def __call__(self, counts: Sequence[int]) -> tuple[float, ...]:
        """A weight a class, given how many examples each has."""


class AsFound(Balance):
    """All examples alike."""

    def __call__(self, counts: Sequence[int]) -> tuple[float, ...]:
        return (1.0,) * len(counts)


class Balanced(Balance):
    """n / (K n_c): all classes alike."""

    def __call__(self, counts: Sequence[int]) -> tuple[float, ...]:
        return tuple(sum(counts) / (len(counts) * n) if n else 0.0 for n in counts)


class TaskSource(Source):
    """A shape: labelled texts in a shuffled order that a seed fixes."""

    texts: TaskFiles
    per_step: int = Field(32, ge=1)
    """Examples in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(256, ge=4)
    """Texts are cut to this many tokens, or to the model's context."""

    def framer(self, env: Env) -> Framer:
        return Framer(env.tokenizer, min(self.longest, env.model.config.context))


class ClassTexts(TaskSource):
    """Texts, or pairs of texts, with a label."""

    balance: Balance = AsFound()

    def open(self, env: Env) -> Stream:
        examples, labels = self.texts.open(Classified), labels_of(env)
        numbers = _numbered([(e.label,) for e in examples], labels, self.texts.path)
        weights = self.balance(_counts(numbers, len(labels)))
        framer = self.framer(env)

        def batch(indices: Sequence[int], rows: Sequence[Documents]) -> Batch:
            return labelled(by_column(rows), [numbers[i][0] for i in indices], weights)

        return TaskStream(
            env, self, len(examples), lambda i: (framer.text(*_pair(examples[i])),), batch
        )


class TaggedTexts(TaskSource):
    """Words with a label each; a word is read at its first token."""

    balance: Balance = AsFound()

    def open(self, env: Env) -> Stream:
        examples, labels = self.texts.open(Tagged), labels_of(env)
        numbers = _numbered([e.tags for e in examples], labels, self.texts.path)
        weights = self.balance(_counts(numbers, len(labels)))
        framer = self.framer(env)

        def batch(indices: Sequence[int], rows: Sequence[Documents]) -> Batch:
            read = zip(indices, rows, strict=True)
            targets = [t for i, (words,) in read for t in numbers[i][: len(words.places)]]
            return labelled(by_column(rows), targets, weights)

        return TaskStream(
            env, self, len(examples), lambda i: (framer.words(examples[i].words),), batch
        )


@dataclass(frozen=True, kw_only=True)
class RatedBatch(Batch):
    """Documents, or pairs of documents, with a number each."""

    values: Float[Tensor, " S"]


class RatedTexts(TaskSource):
    """Texts, or pairs of texts read in one, with a number."""

    def open(self, env: Env) -> Stream:
        examples, framer = self.texts.open(Rated), self.framer(env)
        return rated(env, self, examples, lambda i: (framer.text(*_pair(examples[i])),))


def rated(
    env: Env, config: TaskSource, examples: Sequence[Rated], documents: Callable[[int], Documents]
) -> Stream:
    """Examples with a number as a stream of `RatedBatch`."""

    def batch(indices: Sequence[int], rows: Sequence[Documents]) -> Batch:
        values = torch.tensor([examples[i].value for i in indices])
        return extend(RatedBatch, by_column(rows), values=values)

    return TaskStream(env, config, len(examples), documents, batch)


class TaskStream(Stream):
    """Examples of one or more documents; its state is the place in the order."""

    def __init__(
        self,
        env: Env,
        config: TaskSource,
        count: int,
        documents: Callable[[int], Documents],
        batch: Callable[[Sequence[int], Sequence[Documents]], Batch],
    ) -> None:
        self.env, self.config, self.documents, self.batch = env, config, documents, batch
        self.order, self.place = Order(count, env.seed), Place()

    def __next__(self) -> Work:
        per_step = self.config.per_step
        mine = self.order.take(self.place, per_step, rank=self.env.rank, world=self.env.world)
        self.place = self.order.after(self.place, per_step)
        rows = [self.documents(i) for i in mine]
        runs = within_budget([sum(len(d.ids) for d in row) for row in rows], self.config.tokens)
        return Work(
            tuple(self.batch([mine[i] for i in run], [rows[i] for i in run]) for run in runs)
        )

    def state(self) -> dict[str, Any]:
        return dict(self.place.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place = Place.restore(state)


def by_column(rows: Sequence[Documents]) -> Batch:
    """The first documents of all examples, then their second ones, and so on."""
    return laid([document for column in zip(*rows, strict=True) for document in column])


def labels_of(env: Env) -> tuple[str, ...]:
    """The labels of the model that is trained.

    Raises:
        TreadleError: its head has none.
    """
    head = task_head(env.model)
    if not head.labels:
        raise TreadleError(
            f"the model's {type(head).__name__} has no labels: add ClassHead for labels of texts, "
            "or TokenHead for labels of words, as the last transform"
        )
    return head.labels


def labelled(batch: Batch, targets: Sequence[int], weights: Sequence[float]) -> Batch:
    """The batch with what is to be predicted, each class weighed."""
    return extend(
        Batch,
        batch,
        targets=torch.tensor(targets),
        weights=torch.tensor([weights[t] for t in targets]),
    )


def extend(kind: type[B], batch: Batch, **fields: Any) -> B:
    """A batch of another kind with the same tokens, some fields new."""
    kept = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    return kind(**{**kept, **fields})


def _pair(example: Classified | Rated) -> tuple[str, str | None]:
    return example.first, example.second


def _numbered(
    tags: Sequence[Sequence[str | int]], labels: tuple[str, ...], path: str
) -> list[list[int]]:
    numbers = []
    for index, row in enumerate(tags):
        try:
            numbers.append([label_number(tag, labels) for tag in row])
        except TreadleError as error:
            raise TreadleError(f"{path}: example {index}: {error}") from None
    return numbers


def _counts(numbers: Sequence[Sequence[int]], labels: int) -> list[int]:
    counts = [0] * labels
    for row in numbers:
        for number in row:
            counts[number] += 1
    return counts
