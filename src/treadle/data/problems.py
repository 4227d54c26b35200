"""The shape of an endless, reproducible supply of problems."""

from __future__ import annotations

from abc import abstractmethod

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
