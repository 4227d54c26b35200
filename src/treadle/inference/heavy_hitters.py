"""H2O, the heavy-hitter oracle: a cache of a fixed size keeps who has been attended to most.

    score_j = sum_i attention(i, j) over all queries i so far, for each head of keys

Half of the budget, or what `recent` says, is for the last tokens, which have had little time.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from treadle.core.cards import Card
from treadle.inference.cache import Cache
from treadle.inference.contiguous import RowMemory
from treadle.inference.retention import Retention, best_and_last
from treadle.models.decoder import DecoderModel

CARD = Card(
    id="inf.kv_cache.h2o",
    paper="Zhang et al. 2023, arXiv:2306.14048",
    summary="A cache of a fixed size: the tokens that were attended to most, and the last.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' "
    "--cache '{kind: HeavyHitters, budget: 256}'",
    oracle="tests/inference/test_inference_retention.py::test_heavy_hitters_are_those_counted",
)


class HeavyHitters(Cache):
    """At most `budget` tokens of each head, and a little more until the next choice."""

    budget: int = Field(512, ge=2)
    recent: int = Field(256, ge=1)
    """Of these, how many are the last ones."""

    @model_validator(mode="after")
    def _recent_fit(self) -> HeavyHitters:
        if self.recent > self.budget:
            raise ValueError(f"recent={self.recent} is more than budget={self.budget}")
        return self

    def build(self, model: DecoderModel, *, pages: int, page: int) -> RowMemory:
        return RowMemory(model, MostAttended(self.budget, self.recent))


@dataclass(frozen=True)
class MostAttended(Retention):
    budget: int
    recent: int

    watch = 2**62
    follow = True

    def size(self, length: int) -> int:
        return min(length, self.budget)

    def keep(self, scores: Float[Tensor, "*R G n"]) -> Int[Tensor, "*R G k"]:
        return best_and_last(scores, size=self.budget, last=self.recent)
