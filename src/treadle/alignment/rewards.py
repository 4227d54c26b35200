"""Rewards: how good a completion is, as functions of the problem and the text.

Weighted(parts=(
    Part(name="correct", reward=Verified(), weight=0.9),
    Part(name="marked", reward=AnswerMarked(), weight=0.1),
))
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from pydantic import Field, model_validator

from treadle.alignment.verifiers import extract_answer, marks
from treadle.core.config import Config
from treadle.data.records import Problem


class Reward(Config):
    """A shape: a completion to a number in [0, 1]."""

    @abstractmethod
    def __call__(self, problem: Problem, completion: str) -> float:
        """The reward of one completion."""


class Verified(Reward):
    """1 where the verifier gives full marks, else 0: nothing to gain by being nearly right."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return float(marks(problem, completion) >= 1.0)


class Graded(Reward):
    """The verifier's own marks, partial credit included."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return marks(problem, completion)


class AnswerMarked(Reward):
    """1 where the completion says what its answer is, right or wrong."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return float(extract_answer(completion) is not None)


class Part(Config):
    """One reward among several."""

    name: str
    reward: Reward
    weight: float = Field(1.0, gt=0.0)


class Weighted(Reward):
    """The weighted mean of named rewards: sum_k w_k r_k / sum_k w_k."""

    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Weighted:
        names = [part.name for part in self.parts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two parts are called `{min(twice)}`: rename one")
        return self

    def __call__(self, problem: Problem, completion: str) -> float:
        return self.combined(self.by_name(problem, completion))

    def combined(self, by_name: Mapping[str, float]) -> float:
        """The weighted mean of the parts' rewards."""
        total = sum(part.weight * by_name[part.name] for part in self.parts)
        return total / sum(part.weight for part in self.parts)

    def by_name(self, problem: Problem, completion: str) -> dict[str, float]:
        """Each part's own reward, for reports."""
        return {part.name: part.reward(problem, completion) for part in self.parts}
