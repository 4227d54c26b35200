"""Best of several: draw more continuations than are told, and tell the likeliest.

rank(y) = 1/|y| sum_t log p(y_t | y_<t)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.request import Completion, Request

CARD = Card(
    id="inf.sampling.best_of",
    paper="Cobbe et al. 2021, arXiv:2110.14168; Adiwardana et al. 2020, arXiv:2001.09977",
    summary="Draws more continuations than are told, and tells the likeliest a token.",
    recipe="treadle generate smollm2-135m-instruct 'A loom is' --temperature 1 -n 2 --best-of 8",
    oracle="tests/inference/test_inference_best_of.py::test_the_likeliest_of_all_that_are_drawn",
)


class BestOf(Config):
    """The best of `of` continuations, which are drawn in one batch."""

    of: int = Field(ge=1)

    def __call__(self, engine: Engine, request: Request) -> list[Completion]:
        """The request's n, the best first.

        Raises:
            TreadleError: fewer are drawn than are to be told, or the request cannot be run.
        """
        if self.of < request.n:
            raise TreadleError(f"best of {self.of}, but n={request.n} are to be told: draw more")
        (drawn,) = engine.generate([replace(request, n=self.of)])
        return sorted(drawn, key=likelihood, reverse=True)[: request.n]


def likelihood(completion: Completion) -> float:
    """Mean log-probability of a token; of no token at all -inf."""
    return mean_logprob(completion.logprobs)


def mean_logprob(logprobs: Sequence[float]) -> float:
    """By which continuations are ranked; of no token at all -inf."""
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
