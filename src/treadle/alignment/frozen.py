"""The policy that reinforcement is held to: a copy of the model as the run finds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch

from treadle.core.config import Config
from treadle.data.source import Env
from treadle.objectives.policy import PolicyBatch, sampled_logprobs

Annotate = Callable[[PolicyBatch], PolicyBatch]


class PolicyReference(Config):
    """A shape: adds reference log-probabilities to batches, where there is a reference."""

    @abstractmethod
    def open(self, env: Env) -> Annotate:
        """Called before the first step, with the model as it is then."""


class NoPolicyReference(PolicyReference):
    """Reinforcement without a KL penalty."""

    def open(self, env: Env) -> Annotate:
        return lambda batch: batch


class FrozenCopy(PolicyReference):
    """A copy of the whole model; it needs the memory of one."""

    def open(self, env: Env) -> Annotate:
        model = deepcopy(env.model).eval().requires_grad_(False)

        @torch.no_grad()
        def annotate(batch: PolicyBatch) -> PolicyBatch:
            here = batch.to(env.device)
            with env.autocast():
                hidden = model(here.tokens, here.context())
                logp = sampled_logprobs(model, hidden[here.sources], here)
            return replace(batch, reference=logp.cpu())

        return annotate
