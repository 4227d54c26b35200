"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from treadle.inference.constraint import Constraint
from treadle.inference.sampling import Sampling

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it `n` times. The prompt is computed once for all n."""

    prompt: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    priority: int = 0
    """Higher goes first and is preempted last."""
    constraint: Constraint | None = None
    """Forked for each completion; the request's own is never advanced."""
    adapter: str | None = None
    """Name of one that was given to `attach`; None: the model by itself."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to report at each place of the prompt, beside the
    log-probability of the token that stands there; None: nothing is reported of the prompt."""

    def limit(self, context: int) -> int:
        """Most tokens of an answer, from a model with this context."""
        return min(self.sampling.max_tokens, context - len(self.prompt))


@dataclass(frozen=True)
class Reading:
    """A token of the prompt under the model, at temperature 1 and without penalties."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens at its place and their log-probabilities."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a request's prompt."""

    tokens: tuple[int, ...]
    """All sampled tokens, the stop token included."""
    text: str
    """Decoded, without stop tokens and without what follows a stop string."""
    logprobs: tuple[float, ...]
    """Of each sampled token under the model at the request's temperature (at 1 where greedy),
    before truncation by top-k, top-p or min-p."""
    finish: Finish
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each token the likeliest tokens and their log-probabilities, if they were asked for."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed."""
    prompt: tuple[Reading, ...] = ()
    """Of each token of the prompt but the first, if it was asked for."""


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: text that is final, and the completion in the last piece."""

    text: str
    tokens: Sequence[int]
    completion: Completion | None = None
