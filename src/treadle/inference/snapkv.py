"""SnapKV: what the end of a prompt attends to is what its answer will attend to.

    score_j = sum over the last `window` queries of their attention to j, for each head of keys
    kept    = the last `window` tokens, and the best of the others by the score averaged over
              `smoothing` neighbours, lest a phrase lose its middle

Made once, when the prompt is read; the answer is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from treadle.core.cards import Card
from treadle.inference.cache import Cache
from treadle.inference.contiguous import RowMemory
from treadle.inference.retention import Retention, best_and_last
from treadle.models.decoder import DecoderModel

CARD = Card(
    id="inf.kv_cache.snapkv",
    paper="Li et al. 2024, arXiv:2404.14469",
    summary="Of a long prompt only what its last tokens attend to is kept.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' "
    "--cache '{kind: SnapKV, budget: 256}'",
    oracle="tests/inference/test_inference_retention.py::test_snapkv_keeps_what_the_end_attends_to",
)


class SnapKV(Cache):
    """At most `budget` tokens of a prompt for each head.

    Where a prompt's last chunk is shorter than `window`, that chunk alone is the window.
    """

    budget: int = Field(512, ge=2)
    window: int = Field(32, ge=1)
    smoothing: int = Field(7, ge=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> SnapKV:
        if self.window > self.budget:
            raise ValueError(f"window={self.window} is more than budget={self.budget}")
        if self.smoothing % 2 == 0:
            raise ValueError(f"smoothing={self.smoothing} has no middle: take an odd number")
        return self

    def build(self, model: DecoderModel, *, pages: int, page: int) -> RowMemory:
        return RowMemory(model, SeenByTheEnd(self.budget, self.smoothing, self.window))


@dataclass(frozen=True)
class SeenByTheEnd(Retention):
    budget: int
    smoothing: int
    watch: int

    later = False

    def size(self, length: int) -> int:
        return min(length, self.budget)

    def keep(self, scores: Float[Tensor, "*R G n"]) -> Int[Tensor, "*R G k"]:
        around = self.smoothing // 2
        smooth = F.avg_pool1d(scores, self.smoothing, stride=1, padding=around)
        return best_and_last(smooth, size=self.budget, last=self.watch)
