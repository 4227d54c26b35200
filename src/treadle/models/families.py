"""The families that treadle reads and writes, and which of them a decoder belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from treadle.core.config import dump
from treadle.core.errors import ConfigError, TreadleError, did_you_mean
from treadle.models import (
    bert,
    gemma,
    gpt1,
    gpt2,
    llama,
    mistral,
    mixtral,
    native,
    olmoe,
    qwen,
    qwen_moe,
)
from treadle.models.decoder import Decoder
from treadle.models.family import Family, Gguf, explicit
from treadle.models.hub.fill import applicable, expected_shapes
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.outline import outline

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    mixtral.FAMILY,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
    olmoe.FAMILY,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.FAMILY,
    gpt1.FAMILY,
    bert.FAMILY,
    native.FAMILY,
)
"""Where several express a decoder, the first is used to save it."""


def family_of_hf(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: none has this `model_type`; names those there are.
    """
    kind = str(config.get("model_type", ""))
    known = {f.huggingface.model_type: f for f in FAMILIES}
    if kind not in known:
        raise ConfigError(f"config.json: unknown model_type `{kind}`{did_you_mean(kind, known)}")
    return known[kind]


def family_of_gguf(architecture: str) -> Gguf:
    """How GGUF files of this `general.architecture` are read.

    Raises:
        ConfigError: no family has it; names those there are.
    """
    known = {f.gguf.architecture: f.gguf for f in FAMILIES if f.gguf}
    if architecture not in known:
        hint = did_you_mean(architecture, known)
        raise ConfigError(f"GGUF: unknown architecture `{architecture}`{hint}")
    return known[architecture]


def family_for_hf(decoder: Decoder, name: str | None = None) -> Family:
    """The family that expresses `decoder` as a config.json; `name` asks for a certain one.

    Raises:
        ConfigError: the family asked for does not have every part of the decoder.
    """
    known = {f.name: f for f in FAMILIES}
    if name is not None and name not in known:
        raise ConfigError(f"unknown family `{name}`{did_you_mean(name, known)}")
    for family in FAMILIES if name is None else (known[name],):
        spelling = family.huggingface
        if _gives_back(decoder, lambda d, s=spelling: s.decoder(s.config(d))):  # type: ignore[misc]
            return family
    raise ConfigError(f"a config.json of {name} cannot express this decoder")


def family_for_gguf(decoder: Decoder) -> tuple[Gguf, GgufHeader]:
    """The GGUF architecture that expresses `decoder`, and its header.

    Raises:
        ConfigError: llama.cpp has no architecture with every part of the decoder.
    """
    known = {f.gguf.architecture: f.gguf for f in FAMILIES if f.gguf}
    for gguf in known.values():

        def there_and_back(d: Decoder, gguf: Gguf = gguf) -> Decoder:
            return gguf.read(_header(gguf, d)).replace(std=d.std)

        if _gives_back(decoder, there_and_back):
            return gguf, _header(gguf, decoder)
    raise ConfigError(
        f"no GGUF architecture of {', '.join(known)} can express this decoder; "
        "save it as a folder instead"
    )


def _header(gguf: Gguf, decoder: Decoder) -> GgufHeader:
    model = outline(decoder)
    shapes = expected_shapes(model, applicable(model, gguf.rules(decoder)))
    return replace(gguf.write(decoder), shapes=shapes)


def _gives_back(decoder: Decoder, there_and_back: Callable[[Decoder], Decoder]) -> bool:
    """Whether a format returns the decoder it was given, up to the rounding of its numbers."""
    try:
        returned = there_and_back(decoder)
    except TreadleError:
        return False
    ours, theirs = (_rounded(dump(explicit(d))) for d in (decoder, returned))
    return bool(ours == theirs)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
