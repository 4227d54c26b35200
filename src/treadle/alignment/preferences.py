"""Preference pairs as batches: the prompt once, both answers as its children.

Pairs that cannot be learned from (both answers the same or empty, a prompt that fills the
context) are left out, counted, and named in `left_out.json`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.alignment.confidence import Confidence, Stated
from treadle.alignment.reference import InitialModel, Reference, reference_of
from treadle.alignment.trees import Tree, TreeStream, answer_tree, assemble_trees, extended
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.formats import Format
from treadle.data.records import Preference
from treadle.data.source import Env, Source
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Records, open_records
from treadle.objectives.dpo import PreferenceBatch


class Pairs(Config):
    """A shape: a supply of preference pairs."""

    @abstractmethod
    def pair(self, index: int) -> Preference:
        """Pair number `index`, from 0."""

    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    def resolve(self, workspace: Workspace | None) -> Pairs:
        """The supply itself, where this one only says in which step to look for it."""
        return self


class PairFiles(Pairs):
    """Pairs out of a file, in any of the formats of `data/formats.py`."""

    path: str = Field(min_length=1)
    format: Format | None = None
    """What a row means; if none is named, the first row decides."""
    held_out: bool = False
    """Take the validation part instead of the training part."""
    parts: LeakFreeSplit = LeakFreeSplit()

    def pair(self, index: int) -> Preference:
        record = _pairs(self)[index]
        assert isinstance(record, Preference)
        return record

    def count(self) -> int:
        return len(_pairs(self))


class Preferences(Source):
    """Preference pairs in a shuffled order that a seed fixes."""

    pairs: Pairs
    per_step: int = Field(16, ge=1)
    """Pairs in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(512, ge=2)
    """Prompt and answer are cut to this many tokens, or to the model's context."""
    reference: Reference = InitialModel()
    confidence: Confidence = Stated()

    def open(self, env: Env) -> PreferenceStream:
        return PreferenceStream(self, env)


class PreferenceStream(TreeStream):
    """Pairs as trees of a prompt, the chosen answer and the rejected one."""

    def __init__(self, config: Preferences, env: Env) -> None:
        config = config.replace(pairs=config.pairs.resolve(env.workspace))
        self.config = config
        count, per_step, tokens = config.pairs.count(), config.per_step, config.tokens
        super().__init__(env, count=count, per_step=per_step, tokens=tokens, what="pair")
        self.reference = reference_of(self, config.reference)
        records = [config.pairs.pair(i) for i in self.kept]
        self.margins = margins_of(records)
        self.confidence = config.confidence(env, records, self.kept, self.tree, tokens)

    def tree(self, index: int) -> Tree:
        return pair_tree(self.env, self.config.pairs, self.config.longest, index)

    def batch(self, trees: list[Tree], places: list[int]) -> PreferenceBatch:
        rows = torch.tensor(places)
        return extended(
            PreferenceBatch,
            assemble_trees(trees),
            reference=None if self.reference is None else self.reference[rows].flatten(),
            confidence=None if self.confidence is None else self.confidence[rows],
            margins=None if self.margins is None else self.margins[rows],
        )


def margins_of(records: Sequence[Preference]) -> Float[Tensor, " P"] | None:
    """What raters said, NaN where they did not; None where they never did."""
    if all(r.margin is None for r in records):
        return None
    return torch.tensor([math.nan if r.margin is None else r.margin for r in records])


def pair_tree(env: Env, pairs: Pairs, longest: int, index: int) -> Tree:
    """Prompt, chosen answer and rejected answer of a pair.

    Raises:
        TreadleError: it cannot be learned from.
    """
    pair = pairs.pair(index)
    prompt, chosen, rejected = answer_tree(env, pair.prompt, (pair.chosen, pair.rejected), longest)
    if chosen.tokens == rejected.tokens:
        raise TreadleError(f"chosen and rejected are the same in longest={longest}")
    return [prompt, chosen, rejected]


@lru_cache(maxsize=8)
def _pairs(files: PairFiles) -> Records:
    parts = open_records(files.path, files.format, Preference, split="train", parts=files.parts)
    return parts[Part.VALIDATION if files.held_out else Part.TRAIN]
