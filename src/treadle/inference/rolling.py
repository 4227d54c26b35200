"""A rolling cache: the last tokens, and the first few, on which attention rests.

A query sees positions p with p < sinks or i - p < window. Without the first tokens a model that
was trained on whole texts falls apart, since it leaves attention that it has no use for on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.inference.cache import Cache
from treadle.inference.contiguous import RowMemory
from treadle.inference.retention import Retention
from treadle.kernels.attention import AttentionRule
from treadle.models.decoder import DecoderModel

CARD = Card(
    id="inf.kv_cache.rolling",
    paper="Xiao et al. 2023, StreamingLLM, arXiv:2309.17453; Beltagy et al. 2020, arXiv:2004.05150",
    summary="Keys and values of the last tokens and of the first few, whatever the length.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' "
    "--cache '{kind: Rolling, window: 512}'",
    oracle="tests/inference/test_inference_retention.py::test_rolling_equals_the_masked_model",
)


class Rolling(Cache):
    """The last `window` tokens and the first `sinks`.

    Layers whose own window is not longer stay as they are. The model's context remains the limit.
    """

    window: int = Field(1024, ge=1)
    sinks: int = Field(4, ge=0)

    def build(self, model: DecoderModel, *, pages: int, page: int) -> RowMemory:
        return RowMemory(model, KeepLast(self.window, self.sinks))


@dataclass(frozen=True)
class KeepLast(Retention):
    window: int
    sinks: int

    early = True

    def rule(self, rule: AttentionRule) -> AttentionRule:
        if rule.window is not None and rule.window <= self.window:
            return rule
        return replace(rule, window=self.window, sinks=self.sinks)

    def size(self, length: int) -> int:
        return min(length, self.window + self.sinks)

    def keep(self, scores: Float[Tensor, "*R G n"]) -> Int[Tensor, "*R G k"]:
        length = scores.shape[-1]
        places = torch.arange(length, device=scores.device)
        kept = places[(places < self.sinks) | (places >= length - self.window)]
        return kept.expand(*scores.shape[:-1], len(kept))
