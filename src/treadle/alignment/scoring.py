"""Scoring what was sampled, by a reward or by the problems' own verifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from treadle.alignment.rewards import Reward, Weighted
from treadle.data.problems import Problems
from treadle.data.records import Problem
from treadle.data.scored import Scored, patiently


def scorer(
    problems: Problems, reward: Reward | None, seconds: float
) -> Callable[[Problem, str], Scored]:
    """What `reward` gives for a completion, or the problems' own verifier if there is none.

    Its calls raise TreadleError where the verifier itself is misconfigured: no completion can be
    scored.
    """

    def marks(problem: Problem, text: str) -> tuple[float, Mapping[str, float]]:
        if isinstance(reward, Weighted):
            parts = reward.by_name(problem, text)
            return reward.combined(parts), parts
        return (reward(problem, text) if reward else problems.score(problem, text)), {}

    return lambda problem, text: patiently(lambda: marks(problem, text), seconds)


def reward_metrics(scores: Sequence[Scored]) -> dict[str, float]:
    """Means of named rewards, and how many verifications failed."""
    sound = [s for s in scores if not s.failure]
    names = sorted({name for s in sound for name in s.parts})
    means = {f"reward_{n}": math.fsum(s.parts[n] for s in sound) / len(sound) for n in names}
    return {**means, "rewards_failed": float(len(scores) - len(sound))}
