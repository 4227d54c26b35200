"""How a model in training is sampled from: its own weights, merged ones, or rounded ones.

What samples is never quite the policy that learns: log-probabilities that the sampler gave stay
with the tokens as those of the behaviour policy mu, and the update's ratio is pi / mu, so that the
difference is weighed away (Yao et al. 2025, truncated importance sampling for quantised rollouts).
Its size is the metric `mismatch`, mean |log pi - log mu| of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.source import Env
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Completion, Request
from treadle.peft.adapter import adapted, merged

Sample = Callable[[Sequence[Request]], list[list[Completion]]]
"""Completions of requests under the model as it is at the call."""


class Sampler(Config):
    """A shape: who computes the rollouts."""

    @abstractmethod
    def open(self, env: Env, slots: int) -> Sample:
        """For as many sequences at once as `slots`."""


class OwnWeights(Sampler):
    """The model itself, in the precision that it trains in."""

    def open(self, env: Env, slots: int) -> Sample:
        engine = Engine(env.model, env.tokenizer, EngineConfig(slots=slots), autocast=env.autocast)

        def sample(requests: Sequence[Request]) -> list[list[Completion]]:
            # The update since the last step changed the weights: no page of before may be found.
            engine.forget()
            return engine.generate(requests)

        return sample


class MergedAdapters(Sampler):
    """The model with its adapters folded in meanwhile: the same but for rounding, without their
    products, at the memory of a second copy of the adapted weights."""

    def open(self, env: Env, slots: int) -> Sample:
        if not adapted(env.model):
            raise TreadleError(
                "MergedAdapters: the model has no adapters; set sampler='{kind: OwnWeights}'"
            )
        sample = OwnWeights().open(env, slots)

        def merge_first(requests: Sequence[Request]) -> list[list[Completion]]:
            with merged(env.model):
                return sample(requests)

        return merge_first


class NativeKernels(Sampler):
    """Rounded to blocks at each step and run in native code: several times as fast on processors.

    Only plain Llamas, with or without adapters, on the processor.
    """

    format: Literal["Q8_0", "Q4_1", "Q4_0"] = "Q8_0"

    def open(self, env: Env, slots: int) -> Sample:
        from treadle.inference.native_runner import NativeRunner

        if env.device != "cpu":
            raise TreadleError(
                f"NativeKernels: they run on processors, but the model trains on {env.device}: "
                "set sampler='{kind: OwnWeights}'"
            )
        page = 32

        def sample(requests: Sequence[Request]) -> list[list[Completion]]:
            context = env.model.config.context
            rows = sum(r.n * -(-(len(r.prompt) + r.limit(context)) // page) for r in requests)
            runner = NativeRunner.of_model(env.model, format=self.format, pages=rows + 1, page=page)
            engine = Engine.of_runner(runner, env.tokenizer, EngineConfig(slots=slots))
            return engine.generate(requests)

        return sample
