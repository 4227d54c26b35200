"""The shape of an endless, reproducible supply of problems."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from pydantic import Field

from treadle.core.config import Config
from treadle.data.records import Problem


class Problems(Config):
    """A shape: problem `index` of a split, the same on every machine."""

    @abstractmethod
    def problem(self, index: int) -> Problem:
        """Problem number `index`, from 0."""

    @abstractmethod
    def score(self, problem: Problem, completion: str) -> float:
        """How good an answer is, in [0, 1]; 1 is correct."""


class Interleaved(Problems):
    """Several families in turn."""

    families: tuple[Problems, ...] = Field(min_length=1)

    def problem(self, index: int) -> Problem:
        """Problem `index // F` of family `index % F`, with its family noted in the metadata."""
        number, family = divmod(index, len(self.families))
        problem = self.families[family].problem(number)
        return replace(problem, metadata={**problem.metadata, "family": family})

    def score(self, problem: Problem, completion: str) -> float:
        family: int = problem.metadata["family"]
        return self.families[family].score(problem, completion)
