"""A family: one architecture of the field, and how checkpoints of others spell it.

A family is a value that ties a `Decoder` to Hugging Face's config.json and tensor names, and to
GGUF's metadata and tensor names. A decoder belongs to a family exactly if that family's config,
written and read again, gives the same decoder: there is no second list of what it can express.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, swap
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.weights import Rule
from treadle.nn.mixers.attention import Attention


@dataclass(frozen=True)
class HuggingFace:
    """config.json and tensor names of transformers."""

    model_type: str
    architecture: str
    """transformers' class with a language-modelling head."""
    read: Callable[[Mapping[str, Any]], Decoder]
    write: Callable[[Decoder], dict[str, Any]]
    rules: Callable[[Decoder], tuple[Rule, ...]]
    prefix: str = "model."
    """Front of the names that a checkpoint saved without its head leaves off."""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns of tensors that old checkpoints carry and that hold nothing learned."""


@dataclass(frozen=True)
class Gguf:
    """Metadata and tensor names of llama.cpp."""

    architecture: str
    read: Callable[[GgufHeader], Decoder]
    write: Callable[[Decoder], GgufHeader]
    rules: Callable[[Decoder], tuple[Rule, ...]]


@dataclass(frozen=True)
class Family:
    """One architecture of the field."""

    name: str
    huggingface: HuggingFace
    gguf: Gguf | None


def explicit(decoder: Decoder) -> Decoder:
    """The same decoder with the defaults that depend on the width written out."""

    def fill(attention: Attention) -> Attention:
        width = attention.head_dim or decoder.dim // attention.heads
        usual = attention.scale == width**-0.5
        return attention.replace(
            kv_heads=attention.kv_heads or attention.heads,
            head_dim=width,
            scale=None if usual else attention.scale,
        )

    filled: Decoder = swap(decoder, Attention, fill)
    return filled


def uniform_attention(decoder: Decoder, family: str) -> Attention:
    """The attention of the first block, for formats that state one for all blocks.

    Raises:
        ConfigError: the first block mixes tokens in another way.
    """
    mixer = decoder.blocks[0].mixer if decoder.blocks else None
    if not isinstance(mixer, Attention):
        raise ConfigError(f"{family} has softmax attention in its blocks, not {mixer!r}")
    return mixer
