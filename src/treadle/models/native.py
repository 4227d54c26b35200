"""treadle's own family: any decoder, however unusual, under its own parameter names.

It is chosen last, for decoders that no family of the field expresses. Its folders have the same
form (config.json, *.safetensors), but only treadle reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.config import dump, parse
from treadle.core.errors import FileFormatError
from treadle.models.decoder import Decoder
from treadle.models.family import Family, HuggingFace
from treadle.models.outline import outline
from treadle.models.weights import Rule, rule


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `treadle` holds."""
    if "decoder" not in config:
        raise FileFormatError("config.json lacks `decoder`")
    return parse(config["decoder"], expect=Decoder, where=lambda path: "config.json")


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json with the whole tree."""
    return {"decoder": dump(decoder)}


def rules(decoder: Decoder) -> tuple[Rule, ...]:
    return tuple(rule(name, name) for name, _ in outline(decoder).named_parameters())


FAMILY = Family(
    name="treadle",
    huggingface=HuggingFace(
        model_type="treadle",
        architecture="DecoderModel",
        read=from_hf,
        write=to_hf,
        rules=rules,
        prefix="",
        ignored=(),
    ),
    gguf=None,
)
