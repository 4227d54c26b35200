"""Which of two answers is better: the shape of whoever says so, a program, a model or a person."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.core.config import Config
from treadle.core.pipeline import Workspace
from treadle.data.problems import Problems
from treadle.data.records import Problem


@dataclass(frozen=True)
class Comparison:
    """Two answers to a problem, in an order that means nothing."""

    problem: Problem
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """What was said of a comparison."""

    first_better: float
    """Probability that the first answer is the better one; 1/2 is a tie."""
    bias: float | None = None
    """Log-odds that its place alone gave to the answer shown first, where that was measured."""


class Labeller(Config):
    """A shape: judges comparisons."""

    @abstractmethod
    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        """A verdict on each, in order."""


class ByVerifier(Labeller):
    """The answer with the higher marks is better; equal marks are a tie."""

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        verdicts = []
        for c in comparisons:
            first, second = (problems.score(c.problem, text) for text in (c.first, c.second))
            verdicts.append(Verdict(0.5 if first == second else float(first > second)))
        return verdicts
