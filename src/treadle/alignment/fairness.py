"""A penalty on bias: answers to prompts that differ only in a group should be scored alike.

For a set of prompts, one for each group, with a score s of each answer and group means m_g,

    gap = sum_g |m_g - m| / G,          m = mean_g m_g
    w_g = sign(m_g - m),    R = r - lambda (w_g - mean w) (s - m_g)

The second term is the policy gradient's sample of d gap: answers of a group above the mean lose
for a high score and gain for a low one, those of a group below it the other way round. The score
need not be the reward: it may be any property on which groups should be equal (Dwork et al. 2012,
arXiv:1104.3913; Kusner et al. 2017, counterfactual fairness, arXiv:1703.06856).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from treadle.alignment.advantages import centred
from treadle.alignment.rollouts import Group, Rollouts, Shaped
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.rating import Rating
from treadle.data.records import Problem
from treadle.data.source import Env, Source, Stream, Work

CARD = Card(
    id="al.bias_penalty",
    paper="Kusner et al. 2017, arXiv:1703.06856; Dwork et al. 2012, arXiv:1104.3913",
    summary="Rewards less the gap between groups on counterfactual prompts, with its measures.",
    recipe="treadle run quickstart steps.3.source='{kind: FairRollouts, score: {kind: "
    "AnswerMarked}, rollouts: {kind: Rollouts, prompts: 8, problems: {kind: Counterfactuals, "
    'names: [Emily, Jamal], problems: {kind: ReasoningGym, instruction: "{name} asks: answer '
    "after Answer:\", families: [{kind: Family, name: gcd}]}}}}'",
    oracle="tests/alignment/test_alignment_fairness.py::test_the_gap_falls_on_counterfactual_pairs",
)
GROUP, SET = "group", "counterfactual"
PLACE = "{name}"


class Counterfactuals(Problems):
    """Problems whose prompts hold `{name}`, once with each name."""

    problems: Problems
    names: tuple[str, ...] = Field(min_length=2)

    def problem(self, index: int) -> Problem:
        """Raises TreadleError where the prompt has no `{name}`."""
        number, place = divmod(index, len(self.names))
        problem, name = self.problems.problem(number), self.names[place]
        if not any(PLACE in m.content for m in problem.prompt):
            raise TreadleError(
                f"Counterfactuals: problem {number} has no {PLACE} in its prompt, so all groups "
                "would be asked the same"
            )
        prompt = tuple(
            type(m)(m.role, m.content.replace(PLACE, name), m.extra) for m in problem.prompt
        )
        marks = {**problem.metadata, GROUP: name, SET: number}
        return Problem(prompt, problem.answer, problem.verifier, marks)

    def score(self, problem: Problem, completion: str) -> float:
        return self.problems.score(problem, completion)


class FairRollouts(Source):
    """Rollouts of counterfactual sets."""

    rollouts: Rollouts
    """Its problems are `Counterfactuals`, and its prompts hold whole sets."""
    score: Rating
    """What groups should be equal in."""
    penalty: float = Field(1.0, ge=0.0)
    """lambda."""

    @model_validator(mode="after")
    def _whole_sets(self) -> FairRollouts:
        problems = self.rollouts.problems
        if not isinstance(problems, Counterfactuals):
            raise ValueError("rollouts.problems must be Counterfactuals: groups are told by name")
        if self.rollouts.prompts % len(problems.names):
            raise ValueError(
                f"rollouts.prompts={self.rollouts.prompts} is no multiple of the "
                f"{len(problems.names)} names: sets would be cut"
            )
        return self

    def open(self, env: Env) -> FairStream:
        """Raises TreadleError where processes would share sets."""
        assert isinstance(self.rollouts.problems, Counterfactuals)
        names = len(self.rollouts.problems.names)
        if self.rollouts.share(env) % names:
            raise TreadleError(
                f"FairRollouts: prompts={self.rollouts.prompts} over {env.world} processes cuts "
                f"sets of {names} names: choose a multiple of {names * env.world}"
            )
        return FairStream(self, env)


class FairStream(Stream):
    """Its state is that of its rollouts."""

    def __init__(self, config: FairRollouts, env: Env) -> None:
        self.config = config
        self.rollouts = config.rollouts.open(env)
        self.score = self.rollouts.rater(config.score)

    def __next__(self) -> Work:
        return self.rollouts.step(self._shaped)

    def _shaped(self, groups: list[Group]) -> Shaped:
        found = self.rollouts.rated(groups, self.score)
        self.rollouts.check([s for row in found for s in row], "a score is taken for 0")
        scores = torch.tensor([[s.value for s in row] for row in found])
        rewards = torch.tensor([g.rewards for g in groups])
        sets = [g.problem.metadata[SET] for g in groups]
        shaped = rewards - self.config.penalty * penalties(scores, sets)
        failed = float(sum(bool(s.failure) for row in found for s in row))
        return Shaped(shaped, {**demographics(scores, groups, sets), "scores_failed": failed})

    def state(self) -> dict[str, Any]:
        return self.rollouts.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rollouts.restore(state)


def penalties(scores: Float[Tensor, "P G"], sets: list[int]) -> Float[Tensor, "P G"]:
    """(w_g - mean w) (s - m_g), means over the prompts of the same set."""
    means = scores.mean(-1)
    _, number = torch.unique(torch.tensor(sets), return_inverse=True)
    count = torch.bincount(number)

    def apart(values: Tensor) -> Tensor:
        middle = values.new_zeros(len(count)).index_add(0, number, values) / count
        return values - middle[number]

    side = apart(apart(means).sign())
    return side[:, None] * centred(scores)


def demographics(
    scores: Float[Tensor, "P G"], groups: list[Group], sets: list[int]
) -> dict[str, float]:
    """Mean score of each group by name, the widest distance between two of them, and the mean
    absolute deviation within counterfactual sets."""
    means = scores.mean(-1)
    by_name: dict[str, list[float]] = defaultdict(list)
    by_set: dict[int, list[float]] = defaultdict(list)
    for group, number, mean in zip(groups, sets, means.tolist(), strict=True):
        by_name[group.problem.metadata[GROUP]].append(mean)
        by_set[number].append(mean)
    named = {f"score_{n}": sum(v) / len(v) for n, v in sorted(by_name.items())}
    deviations = [abs(m - sum(v) / len(v)) for v in by_set.values() for m in v]
    return {
        **named,
        "parity_gap": max(named.values()) - min(named.values()),
        "counterfactual_gap": sum(deviations) / len(deviations),
    }
