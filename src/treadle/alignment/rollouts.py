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
from pydantic import Field
from torch import Tensor

from treadle.alignment.advantages import Advantage, GroupNormalised
from treadle.alignment.frozen import NoPolicyReference, PolicyReference
from treadle.alignment.rewards import Reward
from treadle.alignment.samplers import OwnWeights, Sampler
from treadle.alignment.scoring import Scored, require_sound, reward_metrics, scorer
from treadle.alignment.trees import assemble_trees, extended
from treadle.alignment.watch import signs
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, within_budget
from treadle.data.problems import Problems
from treadle.data.records import Problem
from treadle.data.source import Env, Limit, Source, Stream, Work
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.objectives.policy import PolicyBatch
from treadle.tokenizers.chat import encode_prompt

REDRAWS = 8
"""Times that a step asks for new prompts when no group has a signal."""
TOLD = 8
"""Different faults of problems and verifiers that the log names."""


class Rollouts(Source):
    """Groups of completions that the model in training samples for problems with a verifier."""

    problems: Problems
    prompts: int = Field(8, ge=1)
    """Problems in a step, over all ranks."""
    completions: int = Field(8, ge=2)
    """Completions for each problem."""
    sampling: Sampling = Sampling(max_tokens=128)
    advantage: Advantage = GroupNormalised()
    tokens: int = Field(4096, ge=1)
    """Most tokens in a micro-batch."""
    reward: Reward | None = None
    """Instead of the problems' own verifier."""
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which a verifier is given up."""
    reference: PolicyReference = NoPolicyReference()
    sampler: Sampler = OwnWeights()
    warn_above: float = Field(0.1, gt=0.0)
    """Mean |log pi - log mu| of a token, in nats, between trainer and sampler."""

    def open(self, env: Env) -> RolloutStream:
        if self.prompts % env.world:
            raise TreadleError(
                f"Rollouts: prompts={self.prompts} cannot be shared by {env.world} processes: "
                f"choose a multiple"
            )
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
        self.score = scorer(config.problems, config.reward, config.patience)
        slots = config.prompts // env.world * config.completions
        self.sample = config.sampler.open(env, slots)

    def __next__(self) -> Work:
        return self.step(lambda groups: Shaped(torch.tensor([g.rewards for g in groups])))

    def step(self, shape: Callable[[list[Group]], Shaped]) -> Work:
        """The next step, with the rewards that `shape` makes of what the verifiers gave."""
        for redraws in range(REDRAWS):
            groups = self.roll()
            shaped = shape(groups)
            advantages = self.config.advantage(shaped.rewards)
            useful = [i for i, row in enumerate(advantages) if bool((row != 0).any())]
            # Several processes must stay in step: there, one without a signal adds nothing.
            if useful or self.env.world > 1:
                batches = self._batches([groups[i] for i in useful], advantages[useful])
                metrics = self._metrics(groups, len(useful), redraws)
                return Work(
                    batches,
                    {**metrics, **shaped.metrics},
                    (mismatch_limit(self.config.warn_above),),
                )
        raise TreadleError(
            f"the rewards within every group were equal for {REDRAWS} draws of "
            f"{self.config.prompts} problems (mean {float(shaped.rewards.mean()):.2f}): choose "
            "easier or harder problems, raise the temperature, or train on solutions first"
        )

    def roll(self) -> list[Group]:
        """Completions and rewards for this rank's share of the next problems."""
        share = self.config.prompts // self.env.world
        first = self.drawn + self.env.rank * share
        self.drawn += self.config.prompts
        groups = self.complete(
            (self.config.problems.problem(i), i) for i in range(first, first + share)
        )
        if not groups:
            raise TreadleError(
                f"the prompts of all {share} problems of a step fill the model's context of "
                f"{self.env.model.config.context} tokens: choose shorter ones"
            )
        require_sound([s for g in groups for s in g.scores])
        for reason in dict.fromkeys(s.failure for g in groups for s in g.scores if s.failure):
            self._tell(f"a completion was left without its reward: {reason}")
        return groups

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
        self.env.model.eval()
        answers = self.sample(requests)
        self.env.model.train()
        return [
            Group(
                problem,
                request.prompt,
                completions,
                tuple(self.score(problem, c.text) for c in completions),
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

    def _metrics(self, groups: list[Group], useful: int, redraws: int) -> dict[str, float]:
        rewards = torch.tensor([g.rewards for g in groups])
        completions = [c for g in groups for c in g.completions]
        lengths = [len(c.tokens) for c in completions]
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(-1).mean()),
            "solved": float((rewards >= 1.0).float().mean()),
            "groups_with_signal": useful / len(groups),
            "redraws": float(redraws),
            "prompts_too_long": float(self.too_long),
            "completion_tokens": sum(lengths) / len(lengths),
            "repetition": sum(repetition(c.tokens) for c in completions) / len(completions),
            "empty": sum(not c.text.strip() for c in completions) / len(completions),
            "cut_off": sum(c.finish == "length" for c in completions) / len(completions),
            **signs([g.completions for g in groups], [g.rewards for g in groups]),
            **reward_metrics([s for g in groups for s in g.scores]),
        }


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the runs of n tokens that stood there before: 0 where none does."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mismatch_limit(most: float) -> Limit:
    """Above it the sampler's log-probabilities are too far from the trainer's."""
    remedy = (
        "what samples is not what learns; take sampler='{kind: OwnWeights}', a finer format, or "
        "train in the sampler's precision"
    )
    return Limit("mismatch", most, remedy)


def prompt_tokens(env: Env, problem: Problem) -> tuple[int, ...]:
    """The problem as the chat template puts it, up to where the assistant begins."""
    return tuple(encode_prompt(env.tokenizer, [m.plain() for m in problem.prompt]))


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


@dataclass(frozen=True)
class Answer:
    """What follows a prompt: the policy's tokens, and between them perhaps others."""

    tokens: Sequence[int]
    learned: Sequence[bool]
    """Which tokens are the policy's."""
    logprobs: Sequence[float]
    """Of these, when they were sampled."""
    advantage: float


def answers_batch(
    trees: Sequence[tuple[Sequence[int], Sequence[Answer]]], temperature: float
) -> PolicyBatch:
    """Each prompt once, with its answers as branches."""
    answers = [a for _, branches in trees for a in branches]
    batch = assemble_trees(
        [
            [
                Piece(prompt, [False] * len(prompt)),
                *(Piece(a.tokens, a.learned, parent=0) for a in branches),
            ]
            for prompt, branches in trees
        ]
    )
    return extended(
        PolicyBatch,
        batch,
        advantages=torch.tensor([a.advantage for a in answers for _ in a.logprobs]),
        behaviour=torch.tensor([p for a in answers for p in a.logprobs]),
        temperature=temperature,
    )
