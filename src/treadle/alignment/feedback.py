"""Which of two answers is better: the shape of whoever says so, a program, a model or a person."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from treadle.core.config import Config
from treadle.core.pipeline import Workspace
from treadle.data.problems import Problems
from treadle.data.rating import require_sound, scorer
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
    failure: str = ""
    """Why there is no verdict; it is a tie then."""


def decided(verdict: Verdict) -> float:
    """The verdict without its doubts: 1 where the first answer won, 0 where the second, 1/2."""
    better = verdict.first_better
    return 0.5 if better == 0.5 else float(better > 0.5)


class Labeller(Config):
    """A shape: judges comparisons."""

    @abstractmethod
    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        """A verdict on each, in order."""


class ByMarks(Labeller):
    """The answer with the higher marks is better; equal marks are a tie."""

    patience: float = Field(10.0, gt=0.0)
    """Seconds after which the verifier is given up."""

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        """Raises TreadleError where the verifier failed for every answer."""
        score = scorer(problems, self.patience)
        found = [(score(c.problem, c.first), score(c.problem, c.second)) for c in comparisons]
        require_sound([s for pair in found for s in pair])
        verdicts = []
        for first, second in found:
            failure = first.failure or second.failure
            tie = failure or first.value == second.value
            better = 0.5 if tie else float(first.value > second.value)
            verdicts.append(Verdict(better, failure=failure))
        return verdicts


def asked(problem: Problem) -> str:
    """What a judge is shown of the conversation before the answer: all of it."""
    if len(problem.prompt) == 1:
        return problem.prompt[0].content
    return "\n\n".join(f"{m.role}: {m.content}" for m in problem.prompt)
