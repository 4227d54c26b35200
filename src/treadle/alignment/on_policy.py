"""What sources share that sample from the model in training: several tries of each problem, and
how they become a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from treadle.alignment.advantages import Advantage, GroupNormalised
from treadle.alignment.frozen import NoPolicyReference, PolicyReference
from treadle.alignment.samplers import OwnWeights, Sampler
from treadle.alignment.trees import assemble_trees, extended
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece
from treadle.data.source import Env, Limit, Source
from treadle.inference.sampling import Sampling
from treadle.objectives.policy import PolicyBatch

REDRAWS = 8
"""Times that a step asks for new problems when no group has a signal."""
TOLD = 8
"""Different faults of problems and verifiers that the log names."""


class OnPolicy(Source):
    """A shape: groups of tries of problems by the model in training."""

    prompts: int = Field(8, ge=1)
    """Problems in a step, over all ranks."""
    completions: int = Field(8, ge=2)
    """Tries of each problem."""
    sampling: Sampling = Sampling(max_tokens=128)
    advantage: Advantage = GroupNormalised()
    tokens: int = Field(4096, ge=1)
    """Most tokens in a micro-batch."""
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which a verifier, an environment or a tool is given up."""
    reference: PolicyReference = NoPolicyReference()
    sampler: Sampler = OwnWeights()
    warn_above: float = Field(0.1, gt=0.0)
    """Mean |log pi - log mu| of a token, in nats, between trainer and sampler."""

    def share(self, env: Env) -> int:
        """How many problems of a step are this rank's.

        Raises:
            TreadleError: they cannot be shared equally.
        """
        return shared(self, "prompts", self.prompts, env)

    def limit(self) -> Limit:
        """Above it the sampler's log-probabilities are too far from the trainer's."""
        remedy = (
            "what samples is not what learns; take sampler='{kind: OwnWeights}', a finer format, "
            "or train in the sampler's precision"
        )
        return Limit("mismatch", self.warn_above, remedy)


def shared(source: Source, name: str, amount: int, env: Env) -> int:
    """This rank's part of what a field of a source says of a step.

    Raises:
        TreadleError: it cannot be shared equally.
    """
    if amount % env.world:
        raise TreadleError(
            f"{type(source).__name__}: {name}={amount} cannot be shared by {env.world} processes: "
            "choose a multiple"
        )
    return amount // env.world


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
