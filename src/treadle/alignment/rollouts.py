"""Rollouts: the on-policy source. generate -> score -> advantage -> batch.

Each step takes the next prompts, lets the one generation engine continue each of them G times
(a group's prompt is computed once), scores the answers, and lays prompt and completions out as a
tree, so that the update computes each prompt once as well. Groups whose rewards are all equal
carry no signal and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.alignment.on_policy import REDRAWS, TOLD, Answer, OnPolicy, answers_batch
from treadle.alignment.watch import signs
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, Piece, assemble, within_budget
from treadle.data.problems import Problems
from treadle.data.rating import (
    Rater,
    Rating,
    Scored,
    guarded,
    require_sound,
    reward_metrics,
)
from treadle.data.records import Problem
from treadle.data.source import Env, Stream, Work
from treadle.inference.request import Completion, Request
from treadle.nn.modes import evaluating
from treadle.objectives.policy import PolicyBatch
from treadle.tokenizers.chat import encode_prompt
from treadle.train.parallel import talk


class Rollouts(OnPolicy):
    """Groups of completions that the model in training samples for problems with a verifier."""

    problems: Problems
    reward: Rating | None = None
    """Instead of the problems' own verifier."""

    def open(self, env: Env) -> RolloutStream:
        return RolloutStream(self, env)


@dataclass(frozen=True)
class Group:
    """A problem, its completions and their rewards."""

    problem: Problem
    prompt: tuple[int, ...]
    completions: Sequence[Completion]
    scores: tuple[Scored, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(s.value for s in self.scores)


@dataclass(frozen=True)
class Shaped:
    """The rewards that a step learns from."""

    rewards: Float[Tensor, "P G"]
    metrics: Mapping[str, float] = field(default_factory=dict)


class RolloutStream(Stream):
    """Its state is how many problems have been drawn: the model's own state makes the rest."""

    def __init__(self, config: Rollouts, env: Env) -> None:
        self.config, self.env = config, env
        self.drawn, self.too_long = 0, 0
        self.told: set[str] = set()
        self.annotate = config.reference.open(env)
        self.rate = self.rater(config.reward)
        self.share = config.share(env)
        self.sample = config.sampler.open(env, self.share * config.completions)

    def __next__(self) -> Work:
        return self.step(lambda groups: Shaped(torch.tensor([g.rewards for g in groups])))

    def step(self, shape: Callable[[list[Group]], Shaped]) -> Work:
        """The next step, with the rewards that `shape` makes of what the verifiers gave."""
        for redraws in range(REDRAWS):
            groups = self.roll()
            shaped = shape(groups)
            advantages = self.config.advantage(shaped.rewards)
            useful = [i for i, row in enumerate(advantages) if bool((row != 0).any())]
            # Processes stay in step: where one has a signal, the others add what they have.
            (signals,) = talk.summed(len(useful))
            if signals:
                batches = self._batches([groups[i] for i in useful], advantages[useful])
                spare = None if batches else self._batches(groups[:1], advantages[:1])[0]
                metrics = {
                    **self.observed(groups),
                    "groups_with_signal": len(useful) / len(groups),
                    "redraws": float(redraws),
                    **shaped.metrics,
                }
                return Work(batches, metrics, (self.config.limit(),), spare)
        raise TreadleError(
            f"the rewards within every group were equal for {REDRAWS} draws of "
            f"{self.config.prompts} problems (mean {float(shaped.rewards.mean()):.2f}): choose "
            "easier or harder problems, raise the temperature, or train on solutions first"
        )

    def roll(self) -> list[Group]:
        """Completions and rewards for this rank's share of the next problems."""
        first = self.drawn + self.env.rank * self.share
        self.drawn += self.config.prompts
        groups = self.complete(
            (self.config.problems.problem(i), i) for i in range(first, first + self.share)
        )
        if not groups:
            raise TreadleError(
                f"the prompts of all {self.share} problems of a step fill the model's context of "
                f"{self.env.model.config.context} tokens: choose shorter ones"
            )
        self.check(
            [s for g in groups for s in g.scores], "a completion was left without its reward"
        )
        return groups

    def rater(self, reward: Rating | None) -> Rater:
        """What rates completions; None: the problems' own verifier."""
        if reward is None:
            return guarded(self.config.problems.score, self.config.patience)
        return reward.open(self.env, self.config.patience)

    def rated(self, groups: Sequence[Group], rater: Rater) -> list[list[Scored]]:
        """Another rating of all completions."""
        return [rater(g.problem, [c.text for c in g.completions]) for g in groups]

    def check(self, scores: Sequence[Scored], what: str) -> None:
        """Name what failed in the log.

        Raises:
            TreadleError: every single one did.
        """
        require_sound(scores)
        for reason in dict.fromkeys(s.failure for s in scores if s.failure):
            self._tell(f"{what}: {reason}")

    def complete(self, problems: Iterable[tuple[Problem, int]]) -> list[Group]:
        """Groups for problems, each with the number that seeds its samples; prompts that fill the
        context are left out and counted."""
        chosen, requests = [], []
        for problem, number in problems:
            prompt = prompt_tokens(self.env, problem)
            if len(prompt) >= self.env.model.config.context:
                self.too_long += 1
                self._tell(
                    f"problem {number} is left out: its prompt of {len(prompt)} tokens fills the "
                    f"model's context of {self.env.model.config.context}"
                )
                continue
            seed = self.config.sampling.seed + self.env.seed + number
            sampling = self.config.sampling.replace(seed=seed)
            chosen.append(problem)
            requests.append(Request(prompt, sampling, n=self.config.completions))
        with evaluating(self.env.model):
            answers = self.sample(requests)
        return [
            Group(
                problem,
                request.prompt,
                completions,
                tuple(self.rate(problem, [c.text for c in completions])),
            )
            for problem, request, completions in zip(chosen, requests, answers, strict=True)
        ]

    def _tell(self, what: str) -> None:
        """Once, and not without end: metrics go on counting."""
        if what not in self.told and len(self.told) < TOLD:
            self.told.add(what)
            self.env.say(f"rollouts: {what}")

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "too_long": self.too_long}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.too_long = int(state["drawn"]), int(state["too_long"])

    def _batches(self, groups: list[Group], advantages: Tensor) -> tuple[PolicyBatch, ...]:
        """Trees of whole groups, as many in a micro-batch as its token budget allows."""
        sizes = [len(g.prompt) + sum(len(c.tokens) for c in g.completions) for g in groups]
        temperature = self.config.sampling.temperature
        return tuple(
            self.annotate(policy_batch([groups[i] for i in run], advantages[run], temperature))
            for run in within_budget(sizes, self.config.tokens)
        )

    def observed(self, groups: Sequence[Group]) -> dict[str, float]:
        """What was sampled and earned, with the signs of a reward that is being gamed."""
        rewards = torch.tensor([g.rewards for g in groups])
        completions = [c for g in groups for c in g.completions]
        lengths = [len(c.tokens) for c in completions]
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(-1).mean()),
            "solved": float((rewards >= 1.0).float().mean()),
            "prompts_too_long": float(self.too_long),
            "completion_tokens": sum(lengths) / len(lengths),
            "empty": sum(not c.text.strip() for c in completions) / len(completions),
            "cut_off": sum(c.finish == "length" for c in completions) / len(completions),
            **signs([g.completions for g in groups], [g.rewards for g in groups]),
            **reward_metrics([s for g in groups for s in g.scores]),
        }


def prompt_tokens(env: Env, problem: Problem) -> tuple[int, ...]:
    """The problem as the chat template puts it, up to where the assistant begins."""
    return tuple(encode_prompt(env.tokenizer, [m.plain() for m in problem.prompt]))


def spare_batch(group: Group) -> Batch:
    """What a process without a lesson keeps in step with: nothing is learned from it."""
    tokens = group.completions[0].tokens
    prompt = Piece(group.prompt, [False] * len(group.prompt))
    return assemble([prompt, Piece(tokens, [True] * len(tokens), parent=0)])


def policy_batch(groups: Sequence[Group], advantages: Tensor, temperature: float) -> PolicyBatch:
    """Prompt and completions of each group as a tree; every completion token is learned."""
    trees = [
        (
            group.prompt,
            [
                Answer(c.tokens, [True] * len(c.tokens), c.logprobs, advantage)
                for c, advantage in zip(group.completions, row, strict=True)
            ],
        )
        for group, row in zip(groups, advantages.tolist(), strict=True)
    ]
    return answers_batch(trees, temperature)
