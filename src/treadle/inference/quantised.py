"""A cache of integers: keys and values in groups of channels with a scale and a least value each.

    code = round((x - least) / scale),   scale = (most - least) / (2^bits - 1)

Every query sees what the cache holds, also within its own prompt, so a text depends neither on how
its prompt was cut nor on a preemption. Half-precision scales cost 32 bits a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.inference.cache import Cache
from treadle.inference.paged_memory import PagedMemory
from treadle.inference.pages import Pages
from treadle.models.decoder import DecoderModel

CARD = Card(
    id="inf.kv_cache.quantised",
    paper="Liu et al. 2024, KIVI, arXiv:2402.02750; Sheng et al. 2023, FlexGen, arXiv:2303.06865",
    summary="Keys and values in 8 or 4 bits, in groups of channels with scale and least value.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --cache '{kind: Quantised}'",
    oracle="tests/inference/test_inference_quantised.py::test_equals_attention_on_rounded_keys",
)


class Quantised(Cache):
    """Integer keys and values, in pages."""

    bits: Literal[8, 4] = 8
    group: int = Field(32, ge=2)
    """Channels of a head that share a scale."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        device = model.embedding.weight.device
        return PagedMemory(model, QuantisedPages(self, page, pages, device), None)


class QuantisedPages(Pages):
    """Planes: codes of keys, their scales and least values, and the same of values."""

    def __init__(self, config: Quantised, page: int, pages: int, device: torch.device) -> None:
        super().__init__(page, pages, device)
        self.config = config

    def encode(self, k: Float[Tensor, "N G D"], v: Float[Tensor, "N G E"]) -> list[Tensor]:
        return [*self._pack(k), *self._pack(v)]

    def decode(
        self, planes: list[Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N G D"], Float[Tensor, "N G E"]]:
        keys, key_lines, values, value_lines = planes
        return self._unpack(keys, key_lines, dtype), self._unpack(values, value_lines, dtype)

    def _pack(self, x: Float[Tensor, "N G D"]) -> tuple[Tensor, Tensor]:
        bits, group = self.config.bits, self.config.group
        if x.shape[-1] % group:
            raise ConfigError(
                f"Quantised.group={group} does not divide heads of {x.shape[-1]} channels: "
                "choose a divisor"
            )
        parts = x.float().unflatten(-1, (-1, group))
        least, most = parts.aminmax(dim=-1, keepdim=True)
        lines = torch.stack([(most - least) / (2**bits - 1), least], -1).half()
        scale, least = lines.float().unbind(-1)
        codes = ((parts - least) / scale.clamp(min=1e-12)).round_().clamp_(0, 2**bits - 1)
        flat = codes.to(torch.uint8).flatten(-2)
        if bits == 4:
            low, high = flat.unflatten(-1, (2, -1)).unbind(-2)
            flat = low | (high << 4)
        return flat, lines.squeeze(-2)

    def _unpack(self, codes: Tensor, lines: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        scale, least = lines.to(torch.float32)[..., None].unbind(-2)
        parts = codes.unflatten(-1, (-1, self.config.group))
        return torch.addcmul(least, parts.float(), scale).flatten(-2).to(dtype)
