"""Rollout workers on other processes or machines, by Ray: the update stays where it is.

Each step the trained weights are put into the object store once; every worker takes them from
there, and the requests of the step are dealt out in turn. It is synchronous: nothing is sampled
from weights of before. A request draws from numbers of its own, so who answers it does not matter:
two workers give what one process gives. A worker that dies is replaced by a new one, which gets the
weights and the dead one's requests. Moritz et al. 2018, Ray, arXiv:1712.05889.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from treadle.alignment.samplers import OwnWeights, Sample, Sampler
from treadle.core.errors import TreadleError
from treadle.data.source import Env
from treadle.inference.request import Completion, Request
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer


class RayActors(Sampler):
    """A pool of workers, on this machine or on the Ray cluster that the process belongs to."""

    workers: int = Field(2, ge=1)
    sampler: Sampler = OwnWeights()
    """How each worker samples."""
    cores: float = Field(1.0, ge=0.0)
    """That Ray sets aside for each."""
    replacements: int = Field(3, ge=0)
    """Workers that are replaced in a step at the most; then the run ends with an error."""

    def open(self, env: Env, slots: int) -> Sample:
        pool = Pool(self, env, -(-slots // self.workers))
        return pool.sample


@dataclass(frozen=True)
class Spelling:
    """A tokenizer in parts that travel."""

    backend: str
    special: SpecialTokens
    template: str | None

    @staticmethod
    def of(tokenizer: Tokenizer) -> Spelling:
        return Spelling(tokenizer.backend.to_str(), tokenizer.special, tokenizer.chat_template)

    def build(self) -> Tokenizer:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend)
        return Tokenizer(backend, special=self.special, chat_template=self.template)


class Worker:
    """What runs in an actor: a copy of the model that samples when it is asked."""

    def __init__(
        self,
        parts: tuple[DecoderModel, Spelling],
        sampler: Sampler,
        slots: int,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        import torch

        model, spelling = parts

        torch.set_num_threads(1)
        self.model = model.eval()
        env = Env(model=self.model, tokenizer=spelling.build(), scratch=Path(), autocast=autocast)
        self.draw = sampler.open(env, slots)

    def process(self) -> int:
        """Number of the process that it is."""
        return os.getpid()

    def sample(
        self, weights: dict[str, Tensor], requests: Sequence[Request]
    ) -> list[list[Completion]]:
        """Under these weights, which are those that train."""
        parameters = dict(self.model.named_parameters())
        for name, value in weights.items():
            parameters[name].data.copy_(value)
        return self.draw(requests)


class Pool:
    """The workers, and what a new one is made of."""

    def __init__(self, config: RayActors, env: Env, slots: int) -> None:
        self.config, self.env, self.ray = config, env, _ray(config)
        wanted, there = config.workers * config.cores, self.ray.cluster_resources().get("CPU", 0.0)
        if wanted > there:  # it may grow: some clusters do
            env.say(f"rollouts: the workers wait for {wanted:g} cores, but Ray has {there:g}")
        # Workers may be where there is no such device.
        model = env.model if env.device == "cpu" else copy.deepcopy(env.model).cpu()
        self.parts = self.ray.put((model, Spelling.of(env.tokenizer)))
        self.slots, self.replaced = slots, 0
        self.workers = [self._hire() for _ in range(config.workers)]

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Every request's completions, in order.

        Raises:
            TreadleError: workers die again and again.
        """
        trained = {
            name: parameter.detach().cpu()
            for name, parameter in self.env.model.named_parameters()
            if parameter.requires_grad
        }
        weights = self.ray.put(trained)
        count = len(self.workers)
        shares = [list(requests[place::count]) for place in range(count)]
        pending = {
            place: self.workers[place].sample.remote(weights, share)
            for place, share in enumerate(shares)
            if share
        }
        answers: list[list[Completion]] = [[] for _ in requests]
        died = 0
        while pending:
            place, answer = next(iter(pending.items()))
            try:
                found = self.ray.get(answer)
            except self.ray.exceptions.RayActorError as error:
                died += 1
                if died > self.config.replacements:
                    raise TreadleError(
                        f"{died} rollout workers died in one step (last: {str(error)[:200]}): "
                        "look at their memory, or raise `replacements`"
                    ) from None
                self.replaced += 1
                self.env.say(f"rollouts: worker {place} died and is replaced; its share is redone")
                self.workers[place] = self._hire()
                pending[place] = self.workers[place].sample.remote(weights, shares[place])
                continue
            del pending[place]
            answers[place::count] = found
        return answers

    def _hire(self) -> Any:
        actor = self.ray.remote(num_cpus=self.config.cores)(Worker)
        return actor.remote(self.parts, self.config.sampler, self.slots, self.env.autocast)


def _ray(config: RayActors) -> Any:
    """Ray, connected: to the cluster of RAY_ADDRESS, or to one begun on this machine.

    Raises:
        TreadleError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise TreadleError("RayActors needs Ray: pip install 'treadle[ray]'") from None
    if not ray.is_initialized():
        ray.init(
            num_cpus=max(1, math.ceil(config.workers * config.cores)),
            include_dashboard=False,
            log_to_driver=False,
        )
    return ray
