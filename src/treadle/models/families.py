"""The families that treadle reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.errors import ConfigError, did_you_mean
from treadle.models import gemma, gpt1, gpt2, llama, mistral, qwen
from treadle.models.decoder import Decoder
from treadle.models.family import Family, Gguf, expresses

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.FAMILY,
    gpt1.FAMILY,
)
"""Where several express a decoder, the first is used to save it."""


def family_of_hf(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: none has this `model_type`; names those there are.
    """
    kind = str(config.get("model_type", ""))
    for family in FAMILIES:
        if family.huggingface.model_type == kind:
            return family
    known = [f.huggingface.model_type for f in FAMILIES]
    raise ConfigError(f"config.json: unknown model_type {kind!r}{did_you_mean(kind, known)}")


def family_of_gguf(architecture: str) -> Gguf:
    """How GGUF files of this `general.architecture` are read.

    Raises:
        ConfigError: no family has it; names those there are.
    """
    known = {f.gguf.architecture: f.gguf for f in reversed(FAMILIES) if f.gguf}
    if architecture not in known:
        raise ConfigError(
            f"GGUF: unknown architecture {architecture!r}{did_you_mean(architecture, known)}"
        )
    return known[architecture]


def family_for_hf(decoder: Decoder, name: str | None = None) -> Family:
    """The family that expresses `decoder` as a config.json; `name` asks for a certain one.

    Raises:
        ConfigError: no family, or not that one, has every part of the decoder.
    """
    for family in FAMILIES:
        if name in (None, family.name) and expresses(
            family.huggingface.write, family.huggingface.read, decoder
        ):
            return family
    names = [f.name for f in FAMILIES]
    if name is not None and name not in names:
        raise ConfigError(f"unknown family `{name}`{did_you_mean(name, names)}")
    raise ConfigError(
        f"no config.json of {name or 'the families ' + ', '.join(names)} can express this decoder"
    )
