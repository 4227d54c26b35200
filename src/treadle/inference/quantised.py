"""A cache of integers: keys and values in groups of channels with a scale and a least value each.

    code = round((x - least) / scale),   scale = (most - least) / (2^bits - 1)

Channels of keys differ much in size, and a large one costs the others of its group their codes.
`Smoothed` divides keys by the channel's usual size to some power before they are rounded, and
multiplies after:

    k'_c = k_c / s_c,   s_c = sqrt(mean k_c^2)^strength

with the mean over a text of random tokens that is read once. KIVI rounds keys by channel over some
tokens instead, which is better still, but what a token is rounded to then depends on those behind
it.

Every query sees what the cache holds, also within its own prompt, so a text depends neither on how
its prompt was cut nor on a preemption. Half-precision scales cost 32 bits a group.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.inference.cache import Cache
from treadle.inference.paged_memory import PagedMemory
from treadle.inference.pages import Pages
from treadle.kernels.attention import AttentionRule
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout

CARD = Card(
    id="inf.kv_cache.quantised",
    paper="Sheng et al. 2023, FlexGen, arXiv:2303.06865; Liu et al. 2024, KIVI, arXiv:2402.02750; "
    "Lin et al. 2024, QServe (SmoothAttention), arXiv:2405.04532",
    summary="Keys and values in 8 or 4 bits, in groups of channels with scale and least value.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --cache '{kind: Quantised}'",
    oracle="tests/inference/test_inference_quantised.py::test_equals_attention_on_rounded_keys",
)


class KeyScale(Config):
    """A shape: what the channels of keys are divided by before they are rounded."""

    @abstractmethod
    def of(self, model: DecoderModel) -> dict[int, Float[Tensor, "G D"]]:
        """For each layer that attends its divisors; none: 1."""


class Unscaled(KeyScale):
    """Nothing."""

    def of(self, model: DecoderModel) -> dict[int, Float[Tensor, "G D"]]:
        return {}


class Smoothed(KeyScale):
    """Their usual size, to some power."""

    strength: float = Field(0.5, gt=0.0, le=1.0)
    tokens: int = Field(192, ge=1)
    """Random ones, of which the usual size is taken."""

    @torch.inference_mode()
    def of(self, model: DecoderModel) -> dict[int, Float[Tensor, "G D"]]:
        count = min(self.tokens, model.config.context)
        tokens = torch.randint(
            model.config.vocab, (count,), generator=torch.Generator().manual_seed(0)
        )
        device = model.embedding.weight.device
        inner = Packed.of(Layout((count,)), device)
        keys = _Keys(inner.positions, inner.length, inner)
        model(tokens.to(device), keys)
        return {layer: size.clamp(min=1e-6) ** self.strength for layer, size in keys.sizes.items()}


@dataclass(eq=False)
class _Keys(Context):
    """Remembers how large the channels of keys are."""

    inner: Context
    sizes: dict[int, Float[Tensor, "G D"]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.sizes[layer] = k.float().square().mean(0).sqrt()
        return self.inner.attend(layer, q, k, v, rule)


class Quantised(Cache):
    """Integer keys and values, in pages."""

    bits: Literal[8, 4] = 8
    group: int = Field(32, ge=2)
    """Channels of a head that share a scale."""
    keys: KeyScale = Unscaled()
    """`Smoothed` for 4 bits."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        return PagedMemory(model, QuantisedPages(self, model, page, pages), None)


class QuantisedPages(Pages):
    """Planes: codes of keys, their scales and least values, and the same of values."""

    def __init__(self, config: Quantised, model: DecoderModel, page: int, pages: int) -> None:
        super().__init__(page, pages, model.embedding.weight.device)
        self.config, self.scales = config, config.keys.of(model)

    def encode(
        self, layer: int, k: Float[Tensor, "N G D"], v: Float[Tensor, "N G E"]
    ) -> list[Tensor]:
        if layer in self.scales:
            k = k / self.scales[layer]
        return [*self._pack(k), *self._pack(v)]

    def decode(
        self, layer: int, planes: list[Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N G D"], Float[Tensor, "N G E"]]:
        keys, key_lines, values, value_lines = planes
        k = self._unpack(keys, key_lines)
        if layer in self.scales:
            k = k * self.scales[layer]
        return k.to(dtype), self._unpack(values, value_lines).to(dtype)

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

    def _unpack(self, codes: Tensor, lines: Tensor) -> Tensor:
        if self.config.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        scale, least = lines.to(torch.float32)[..., None].unbind(-2)
        parts = codes.unflatten(-1, (-1, self.config.group))
        return torch.addcmul(least, parts.float(), scale).flatten(-2)
