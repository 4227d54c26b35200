"""Tasks: what is asked of a model, and how the answers become scores.

A task turns rows into *items* (plain, frozen data that fix the whole question, shots included),
runs those whose answers are not on record, and sums the records up. Three kinds follow:
`MultipleChoice`, `Generative` and `Perplexity`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from treadle.core.config import Config
from treadle.core.results import Figure, accuracy
from treadle.inference.engine import EngineConfig
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model under test, and how it may be run."""

    model: DecoderModel
    tokenizer: Tokenizer
    tokens: int
    """Tokens computed in one pass."""
    engine: EngineConfig
    autocast: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Item:
    """One question as it is put to the model; kinds of tasks add their fields."""

    index: int
    group: str
    """Part of the benchmark it belongs to, such as a subject of MMLU; may be empty."""


@dataclass(frozen=True)
class Record:
    """What came of an item."""

    output: Mapping[str, Any]
    """What the model said or how likely it found what, as JSON values."""
    metrics: Mapping[str, float]


Done = Callable[[Item, Record], None]


class Benchmark(Config):
    """A shape: a benchmark."""

    name: str = Field(min_length=1)
    """In results and file names; tasks of one evaluation differ in it."""
    limit: int | None = Field(None, ge=1)
    """Take the first so many rows only."""

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """The questions, in order."""

    @abstractmethod
    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        """Answer the items in any order, and report each as soon as it is done."""

    @abstractmethod
    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Figures by metric."""


def shares(records: Sequence[Record]) -> dict[str, Figure]:
    """The mean of each metric, which is 0 or 1 for each record."""
    return {name: accuracy([r.metrics[name] for r in records]) for name in records[0].metrics}
