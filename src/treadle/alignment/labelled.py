"""Answers that someone called good or bad, for KTO: each beside an answer to another prompt."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import torch
from pydantic import Field

from treadle.alignment.preferences import Pairs
from treadle.alignment.reference import InitialModel, reference_of
from treadle.alignment.trees import (
    Tree,
    TreeStream,
    answer_tree,
    assemble_trees,
    extended,
    says_something,
)
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.formats import Format
from treadle.data.records import Labelled, Messages
from treadle.data.source import Env, Source
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Records, open_records
from treadle.objectives.kto import LabelledBatch

ALONE = "no answer is to another prompt: KTO compares with one"


class Judged(Config):
    """A shape: a supply of answers with a verdict."""

    @abstractmethod
    def answer(self, index: int) -> Labelled:
        """Answer number `index`, from 0."""

    @abstractmethod
    def count(self) -> int:
        """How many there are."""


class JudgedFiles(Judged):
    """Out of a file, in any of the formats of `data/formats.py`."""

    path: str = Field(min_length=1)
    format: Format | None = None
    """What a row means; if none is named, the first row decides."""
    parts: LeakFreeSplit = LeakFreeSplit()

    def answer(self, index: int) -> Labelled:
        record = _answers(self)[index]
        assert isinstance(record, Labelled)
        return record

    def count(self) -> int:
        return len(_answers(self))


class Unpaired(Judged):
    """Pairs taken apart: the chosen answer is good, the rejected one bad."""

    pairs: Pairs

    def answer(self, index: int) -> Labelled:
        pair = self.pairs.pair(index // 2)
        good = index % 2 == 0
        return Labelled(pair.prompt, pair.chosen if good else pair.rejected, good)

    def count(self) -> int:
        return 2 * self.pairs.count()


class Judgements(Source):
    """Judged answers in a shuffled order that a seed fixes."""

    answers: Judged
    per_step: int = Field(16, ge=1)
    """Answers in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(512, ge=2)
    """Prompt and answer are cut to this many tokens, or to the model's context."""

    def open(self, env: Env) -> JudgementStream:
        return JudgementStream(self, env)


class JudgementStream(TreeStream):
    """Trees of a prompt, its answer, and the answer to another prompt."""

    def __init__(self, config: Judgements, env: Env) -> None:
        self.config = config
        count, per_step, tokens = config.answers.count(), config.per_step, config.tokens
        prompts = (config.answers.answer(i).prompt for i in range(count))
        first = next(prompts, None)
        if first is not None and all(prompt == first for prompt in prompts):
            raise TreadleError(ALONE)  # each answer would look through all others for one
        super().__init__(env, count=count, per_step=per_step, tokens=tokens, what="answer")
        self.reference = reference_of(self, InitialModel())

    def tree(self, index: int) -> Tree:
        judged = self.config.answers.answer(index)
        answers = (judged.completion, self._other(index, judged))
        return answer_tree(self.env, judged.prompt, answers, self.config.longest)

    def _other(self, index: int, judged: Labelled) -> Messages:
        """The next answer to a different prompt (of pairs taken apart, neighbours share one) that
        says something."""
        count = self.config.answers.count()
        for step in range(1, count):
            other = self.config.answers.answer((index + step) % count)
            if other.prompt != judged.prompt and says_something(other.completion):
                return other.completion
        raise TreadleError(ALONE)

    def batch(self, trees: list[Tree], places: list[int]) -> LabelledBatch:
        assert self.reference is not None
        good = [self.config.answers.answer(self.kept[i]).good for i in places]
        return extended(
            LabelledBatch,
            assemble_trees(trees),
            reference=self.reference[torch.tensor(places)].flatten(),
            good=torch.tensor(good),
        )


@lru_cache(maxsize=8)
def _answers(files: JudgedFiles) -> Records:
    parts = open_records(files.path, files.format, Labelled, split="train", parts=files.parts)
    return parts[Part.TRAIN]
