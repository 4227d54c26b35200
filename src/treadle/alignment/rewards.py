"""Rewards: how good a completion is, as functions of the problem and the text.

Weighted(parts=(
    Part(name="correct", reward=Verified(), weight=0.9),
    Part(name="marked", reward=AnswerMarked(), weight=0.1),
))
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field, model_validator

from treadle.alignment.verifiers import extract_answer, marks
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.rating import Rater, Rating, Scored, guarded
from treadle.data.records import Problem
from treadle.data.source import Env
from treadle.inference.reasoning.strategy import END_THINK, THINK, private, visible


class Reward(Rating):
    """A shape: a rule, a completion to a number in [0, 1]."""

    @abstractmethod
    def __call__(self, problem: Problem, completion: str) -> float:
        """The reward of one completion."""

    def open(self, env: Env, patience: float) -> Rater:
        return guarded(self, patience)


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


class Unmarked(Reward):
    """1 where the completion never says what its answer is: a cost."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return float(extract_answer(completion) is None)


class PrivatelyReasoned(Reward):
    """1 where reasoning stands between `<think>` tags and an answer follows them, and no tag is
    left over."""

    def __call__(self, problem: Problem, completion: str) -> float:
        once = completion.count(THINK) == completion.count(END_THINK) == 1
        begins = completion.lstrip().startswith(THINK)
        said = once and begins and bool(private(completion))
        return float(said and extract_answer(visible(completion)) is not None)


class Part(Config):
    """One reward among several."""

    name: str
    reward: Rating
    weight: float = Field(1.0, ge=0.0)
    """0: it is watched, and nothing is learned by it."""


class Combination(Config):
    """A shape: several rewards in [0, 1] as one."""

    @abstractmethod
    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        """The reward of all together."""


class ArithmeticMean(Combination):
    """sum_k w_k r_k / sum_k w_k: what is won in one part makes up for another."""

    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)


class GeometricMean(Combination):
    """prod_k r_k^(w_k / sum w): nothing is won in one part where another gives nothing, so a part
    that can be gamed does not carry the rest. Nash 1950, The bargaining problem."""

    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        total = sum(weights)
        parts = zip(rewards, weights, strict=True)
        return math.prod(math.pow(max(r, 0.0), w / total) for r, w in parts)


class WorstOf(Combination):
    """min_k r_k, whatever the weights (Coste et al. 2023, arXiv:2310.02743)."""

    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        return min(rewards)


class UncertaintyWeighted(Combination):
    """mean_k r_k - doubt var_k r_k, at least 0: of several reward models, where they disagree no
    answer is worth much (Coste et al. 2023, arXiv:2310.02743)."""

    doubt: float = Field(1.0, ge=0.0)

    def __call__(self, rewards: Sequence[float], weights: Sequence[float]) -> float:
        mean = ArithmeticMean()(rewards, weights)
        spread = ArithmeticMean()([(r - mean) ** 2 for r in rewards], weights)
        return max(mean - self.doubt * spread, 0.0)


class Weighted(Reward):
    """Named rewards together; as a rule their weighted mean."""

    parts: tuple[Part, ...] = Field(min_length=1)
    together: Combination = ArithmeticMean()

    @model_validator(mode="after")
    def _names_differ(self) -> Weighted:
        names = [part.name for part in self.parts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two parts are called `{min(twice)}`: rename one")
        if not any(part.weight for part in self.parts):
            raise ValueError("no part has a weight: nothing would be learned")
        return self

    def __call__(self, problem: Problem, completion: str) -> float:
        """Raises TreadleError where a part is no rule."""
        return self.combined([_by_rule(part, problem, completion) for part in self.parts]).value

    def open(self, env: Env, patience: float) -> Rater:
        raters = [part.reward.open(env, patience) for part in self.parts]

        def rate(problem: Problem, texts: Sequence[str]) -> list[Scored]:
            columns = [rater(problem, texts) for rater in raters]
            return [self.combined(row) for row in zip(*columns, strict=True)]

        return rate

    def combined(self, scores: Sequence[Scored]) -> Scored:
        """The reward of all parts together; where one that counts failed there is none."""
        rows = list(zip(self.parts, scores, strict=True))
        for part, scored in rows:
            if part.weight and scored.failure:
                return Scored(0.0, failure=f"`{part.name}`: {scored.failure}")
        learned = [(scored.value, part.weight) for part, scored in rows if part.weight]
        rewards, weights = zip(*learned, strict=True)
        value = self.together(rewards, weights)
        if not math.isfinite(value):
            return Scored(0.0, failure=f"the rewards together were {value}")
        return Scored(value, {p.name: scored.value for p, scored in rows if not scored.failure})


def _by_rule(part: Part, problem: Problem, completion: str) -> Scored:
    if not isinstance(part.reward, Reward):
        raise TreadleError(
            f"Weighted: `{part.name}` is no rule but a {type(part.reward).__name__}, which has to "
            "be opened first: name the reward in `rollouts.reward`, not in the problems"
        )
    return Scored(part.reward(problem, completion))
