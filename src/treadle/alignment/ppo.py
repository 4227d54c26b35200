"""Rollouts for PPO: each lot of samples is learned for several epochs of mini-batches.

    r_t = -beta (log pi_old - log ref)  at each token,  + score at the last
    beta <- beta (1 + k clip(KL / target - 1, -0.2, 0.2))     after each lot (Ziegler et al. 2019)

The inner epochs are steps of the one loop: the source hands out the same samples again, in
another order, before it samples anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.alignment.frozen import FrozenCopy
from treadle.alignment.gae import gae
from treadle.alignment.rollouts import Group, Rollouts, policy_batch
from treadle.alignment.trees import assemble_trees, extended
from treadle.data.batch import Piece, within_budget
from treadle.data.source import Env, Source, Stream, Work
from treadle.nn.modes import evaluating
from treadle.objectives.policy import sampled_logprobs
from treadle.objectives.ppo import PPOBatch, state_values
from treadle.train.parallel import talk


class PPORollouts(Source):
    """PPO's samples, with a penalty on the KL to the model as the run finds it."""

    rollouts: Rollouts
    """What is sampled for a lot; its advantage and reference are not used."""
    epochs: int = Field(2, ge=1)
    minibatches: int = Field(2, ge=1)
    """Optimiser steps in an epoch."""
    gamma: float = Field(1.0, gt=0.0, le=1.0)
    lam: float = Field(0.95, ge=0.0, le=1.0)
    beta: float = Field(0.05, ge=0.0)
    """Penalty on the KL at first."""
    target: float = Field(6.0, gt=0.0)
    """KL of a completion, in nats, that the penalty steers to."""
    gain: float = Field(0.1, ge=0.0)
    """How fast: the constant k; 0 keeps the penalty as it is."""

    def open(self, env: Env) -> PPOStream:
        return PPOStream(self, env)


@dataclass(frozen=True)
class Episode:
    """One completion with all that its update needs, in lists of one number a token."""

    prompt: list[int]
    tokens: list[int]
    behaviour: list[float]
    advantages: list[float]
    returns: list[float]
    values: list[float]


class PPOStream(Stream):
    """Its state holds the episodes of the lot that is being learned."""

    def __init__(self, config: PPORollouts, env: Env) -> None:
        self.config, self.env = config, env
        self.rollouts = config.rollouts.open(env)
        self.annotate = FrozenCopy().open(env)
        self.beta = config.beta
        self.lot: list[Episode] = []
        self.taken, self.lots = 0, 0
        self.metrics: dict[str, float] = {}

    def __next__(self) -> Work:
        steps = self.config.epochs * self.config.minibatches
        if not self.lot or self.taken == steps:
            self._sample()
        epoch, part = divmod(self.taken, self.config.minibatches)
        # A lot is sampled once: its mismatch is told of once.
        limit = self.config.rollouts.limit()
        limits = (limit,) if self.taken == 0 else ()
        self.taken += 1
        order = np.random.default_rng([self.env.seed, self.lots, epoch]).permutation(len(self.lot))
        mine = [self.lot[i] for i in np.array_split(order, self.config.minibatches)[part]]
        sizes = [len(e.prompt) + len(e.tokens) for e in mine]
        runs = within_budget(sizes, self.config.rollouts.tokens)
        temperature = self.config.rollouts.sampling.temperature
        batches = tuple(episode_batch([mine[i] for i in run], temperature) for run in runs)
        return Work(batches, self.metrics, limits)

    @torch.no_grad()
    def _sample(self) -> None:
        groups = self.rollouts.roll()
        temperature = self.config.rollouts.sampling.temperature
        self.lot = []
        distances, gaps = [], []
        for group in groups:
            nothing = torch.zeros(1, len(group.completions))
            batch = self.annotate(policy_batch([group], nothing, temperature))
            assert batch.reference is not None
            here = batch.to(self.env.device)
            with evaluating(self.env.model), self.env.autocast():
                model = self.env.model
                hidden = model(here.tokens, here.context())[here.sources]
                values = state_values(model, hidden).cpu()
                logp = sampled_logprobs(model, hidden, here)
            gaps.append((logp.cpu() - batch.behaviour).abs())
            kl = batch.behaviour - batch.reference
            distances.append(batch.per_sequence(kl))
            self.lot += self._episodes(group, -self.beta * kl, values)
        # Penalty and advantages are by the lot of all ranks, so that all learn by the same measure.
        gone, answers = talk.summed(float(torch.cat(distances).sum()), len(self.lot))
        distance = gone / answers
        self.beta *= 1 + self.config.gain * float(
            np.clip(distance / self.config.target - 1, -0.2, 0.2)
        )
        self._whiten()
        self.taken, self.lots = 0, self.lots + 1
        self.metrics = {
            **self.rollouts.observed(groups),
            "kl": distance,
            "mismatch": float(torch.cat(gaps).mean()),
            "beta": self.beta,
        }

    def _episodes(
        self, group: Group, penalties: Float[Tensor, " M"], values: Float[Tensor, " M"]
    ) -> list[Episode]:
        lengths = [len(c.tokens) for c in group.completions]
        episodes = []
        for completion, score, rewards, value in zip(
            group.completions,
            group.rewards,
            penalties.split(lengths),
            values.split(lengths),
            strict=True,
        ):
            rewards = rewards.clone()
            rewards[-1] += score
            found = gae(rewards, value, gamma=self.config.gamma, lam=self.config.lam)
            episodes.append(
                Episode(
                    prompt=list(group.prompt),
                    tokens=list(completion.tokens),
                    behaviour=list(completion.logprobs),
                    advantages=found.advantages.tolist(),
                    returns=found.returns.tolist(),
                    values=value.tolist(),
                )
            )
        return episodes

    def _whiten(self) -> None:
        """Advantages of a lot to mean 0 and standard deviation 1."""
        flat = np.concatenate([e.advantages for e in self.lot])
        total, count = talk.summed(float(flat.sum()), len(flat))
        mean = total / count
        (squares,) = talk.summed(float(((flat - mean) ** 2).sum()))
        std = float(np.sqrt(squares / count)) + 1e-8
        self.lot = [
            Episode(**{**vars(e), "advantages": [(a - mean) / std for a in e.advantages]})
            for e in self.lot
        ]

    def state(self) -> dict[str, Any]:
        return {
            "rollouts": self.rollouts.state(),
            "lot": [vars(e) for e in self.lot],
            "taken": self.taken,
            "lots": self.lots,
            "beta": self.beta,
            "metrics": self.metrics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rollouts.restore(state["rollouts"])
        self.lot = [Episode(**e) for e in state["lot"]]
        self.taken, self.lots = int(state["taken"]), int(state["lots"])
        self.beta, self.metrics = float(state["beta"]), dict(state["metrics"])


def episode_batch(episodes: list[Episode], temperature: float) -> PPOBatch:
    """Episodes one beside another; those of one prompt share it."""
    trees: dict[tuple[int, ...], list[Episode]] = {}
    for episode in episodes:
        trees.setdefault(tuple(episode.prompt), []).append(episode)
    ordered = [e for row in trees.values() for e in row]
    batch = assemble_trees(
        [
            [
                Piece(prompt, [False] * len(prompt)),
                *(Piece(e.tokens, [True] * len(e.tokens), parent=0) for e in row),
            ]
            for prompt, row in trees.items()
        ]
    )
    return extended(
        PPOBatch,
        batch,
        advantages=torch.tensor([a for e in ordered for a in e.advantages]),
        behaviour=torch.tensor([b for e in ordered for b in e.behaviour]),
        returns=torch.tensor([r for e in ordered for r in e.returns]),
        values=torch.tensor([v for e in ordered for v in e.values]),
        temperature=temperature,
    )
