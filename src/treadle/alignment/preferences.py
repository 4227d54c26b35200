"""Preference pairs as batches: the prompt once, both answers as its children.

The log-probabilities of all answers under the reference, which is the model as the run finds it,
are computed once and kept beside the run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.core.files import atomic_file
from treadle.data.batch import Batch, Piece, assemble, within_budget
from treadle.data.formats import Format
from treadle.data.order import Order, Place
from treadle.data.records import Preference
from treadle.data.source import Env, Source, Stream, Work
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Records, open_records
from treadle.objectives.dpo import PreferenceBatch, sequence_logprobs
from treadle.tokenizers.chat import LastTurn, encode_chat, encode_prompt


class Pairs(Config):
    """A shape: a supply of preference pairs."""

    @abstractmethod
    def pair(self, index: int) -> Preference:
        """Pair number `index`, from 0."""

    @abstractmethod
    def count(self) -> int:
        """How many there are."""


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
    """Prompt and answer are cut to this many tokens; pairs left without an answer are an error."""

    def open(self, env: Env) -> PreferenceStream:
        return PreferenceStream(self, env)


class PreferenceStream(Stream):
    """Its state is the place in the order of pairs."""

    def __init__(self, config: Preferences, env: Env) -> None:
        self.config, self.env = config, env
        self.order, self.place = Order(config.pairs.count(), env.seed), Place()
        self.reference = self._reference()

    def __next__(self) -> Work:
        mine = self.order.take(
            self.place, self.config.per_step, rank=self.env.rank, world=self.env.world
        )
        self.place = self.order.after(self.place, self.config.per_step)
        trees = [self.tree(i) for i in mine]
        batches = []
        for run in within_budget([_size(t) for t in trees], self.config.tokens):
            batch = assemble_trees([trees[i] for i in run])
            numbers = torch.tensor([mine[i] for i in run])
            fields = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
            reference = self.reference[numbers].flatten()
            batches.append(PreferenceBatch(**fields, reference=reference))
        return Work(tuple(batches))

    def tree(self, index: int) -> list[Piece]:
        """Prompt, chosen answer and rejected answer of a pair.

        Raises:
            TreadleError: an answer is empty after truncation, or both are the same.
        """
        pair = self.config.pairs.pair(index)
        messages = [m.plain() for m in pair.prompt]
        prompt = encode_prompt(self.env.tokenizer, messages)
        answers = []
        for answer in (pair.chosen, pair.rejected):
            chat = [*messages, *(m.plain() for m in answer)]
            ids = encode_chat(self.env.tokenizer, chat, turns=LastTurn()).ids
            answers.append(ids[len(prompt) : self.config.longest])
        if not all(answers):
            raise TreadleError(
                f"pair {index}: its prompt has {len(prompt)} tokens, which leaves no room for an "
                f"answer in longest={self.config.longest}: raise it, or leave the pair out"
            )
        if answers[0] == answers[1]:
            raise TreadleError(f"pair {index}: chosen and rejected are the same: leave it out")
        return [
            Piece(prompt, [False] * len(prompt)),
            *(Piece(ids, [True] * len(ids), parent=0) for ids in answers),
        ]

    @torch.no_grad()
    def _reference(self) -> Float[Tensor, "P 2"]:
        """Log-probabilities of all answers under the model as it is now, or as they were kept."""
        path = self.env.scratch / "reference.safetensors"
        if not path.exists():
            trees = [self.tree(i) for i in range(self.config.pairs.count())]
            parts = []
            for run in within_budget([_size(t) for t in trees], self.config.tokens):
                batch = assemble_trees([trees[i] for i in run]).to(self.env.device)
                with self.env.autocast():
                    parts.append(sequence_logprobs(self.env.model, batch).cpu())
            with atomic_file(path) as temporary:
                save_file({"logprobs": torch.cat(parts).unflatten(0, (-1, 2))}, temporary)
        return load_file(path)["logprobs"]

    def state(self) -> dict[str, Any]:
        return dict(self.place.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place = Place.restore(state)


def assemble_trees(trees: Sequence[Sequence[Piece]]) -> Batch:
    """One batch of several trees, whose parents are counted within each."""
    pieces: list[Piece] = []
    for tree in trees:
        root = len(pieces)
        pieces += [Piece(p.tokens, p.learn, p.parent + root if p.parent >= 0 else -1) for p in tree]
    return assemble(pieces)


def _size(tree: Sequence[Piece]) -> int:
    return sum(len(p.tokens) for p in tree)


@lru_cache(maxsize=8)
def _pairs(files: PairFiles) -> Records:
    parts = open_records(files.path, files.format, Preference, split="train", parts=files.parts)
    return parts[Part.VALIDATION if files.held_out else Part.TRAIN]
