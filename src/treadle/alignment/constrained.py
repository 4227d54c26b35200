"""Safe reinforcement: the most reward whose mean cost stays under a limit.

    max_pi E[r]  subject to  E[c] <= d
    R = (r - lambda c) / (1 + lambda),     log lambda <- log lambda + eta (mean c - d) / d

The multiplier lambda rises while answers cost too much and falls while they do not; dividing by
1 + lambda keeps the rewards' size (Dai et al. 2023, Safe RLHF, arXiv:2310.12773).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from treadle.alignment.rollouts import Group, Rollouts, Shaped
from treadle.core.cards import Card
from treadle.data.rating import Rating
from treadle.data.source import Env, Source, Stream, Work
from treadle.train.parallel import talk

CARD = Card(
    id="al.reward.safety",
    paper="Dai et al. 2023, Safe RLHF, arXiv:2310.12773",
    summary="A cost beside the reward, held under a limit by a Lagrange multiplier.",
    recipe="treadle run quickstart steps.3.source='{kind: ConstrainedRollouts, limit: 0.2, cost: "
    "{kind: Unmarked}, rollouts: {kind: Rollouts, problems: {kind: ReasoningGym, families: "
    "[{kind: Family, name: gcd}]}}}'",
    oracle="tests/alignment/test_alignment_constrained.py::test_cost_is_held_under_its_limit",
)
LARGEST, SMALLEST = 100.0, 0.01
"""Of the multiplier: beyond, only the cost counts anyway, or only the reward; and it is to be back
soon when that changes. One that starts below rises only."""


class ConstrainedRollouts(Source):
    """Rollouts whose answers have a cost besides their reward."""

    rollouts: Rollouts
    cost: Rating
    """What an answer costs, 0 to 1: a rule or a cost model, whose high values are bad."""
    limit: float = Field(gt=0.0, le=1.0)
    """The mean cost d that is allowed."""
    multiplier: float = Field(1.0, gt=0.0)
    """lambda at first."""
    rate: float = Field(0.1, gt=0.0)
    """The step eta."""

    def open(self, env: Env) -> ConstrainedStream:
        return ConstrainedStream(self, env)


class ConstrainedStream(Stream):
    """Its state is that of its rollouts, and the multiplier."""

    def __init__(self, config: ConstrainedRollouts, env: Env) -> None:
        self.config = config
        self.rollouts = config.rollouts.open(env)
        self.cost = self.rollouts.rater(config.cost)
        self.multiplier = config.multiplier

    def __next__(self) -> Work:
        return self.rollouts.step(self._shaped)

    def _shaped(self, groups: list[Group]) -> Shaped:
        found = self.rollouts.rated(groups, self.cost)
        self.rollouts.check([c for row in found for c in row], "a cost is taken for the highest")
        # A cost that could not be found is taken for the highest: doubt must not pay.
        costs = torch.tensor([[1.0 if c.failure else c.value for c in row] for row in found])
        rewards = torch.tensor([g.rewards for g in groups])
        used = self.multiplier
        # The multiplier is one for all ranks, so that all learn from the same reward.
        total, count = talk.summed(float(costs.sum()), costs.numel())
        mean = total / count
        step = self.config.rate * (mean - self.config.limit) / self.config.limit
        moved = math.exp(min(math.log(used) + step, math.log(LARGEST)))
        self.multiplier = max(moved, min(used, SMALLEST))
        return Shaped(
            (rewards - used * costs) / (1 + used),
            {
                "cost": mean,
                "multiplier": used,
                "costs_failed": float(sum(bool(c.failure) for row in found for c in row)),
            },
        )

    def state(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts.state(), "multiplier": self.multiplier}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rollouts.restore(state["rollouts"])
        self.multiplier = float(state["multiplier"])
