"""Rotary positions as config.json spells them.

transformers 5 has `rope_parameters` (theta and scaling together), version 4 `rope_theta` and
`rope_scaling`. Both are read; `rope_to_hf` writes both, and either version takes its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from treadle.core.errors import ConfigError, did_you_mean
from treadle.models.hub.hf_config import HfConfig
from treadle.nn.rope import NoScaling, RoPE, Scaling
from treadle.nn.rope_scaling import (
    DividedFrequencies,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    YaRN,
)

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_from_hf(config: HfConfig, *, context: int, theta: float = 10_000.0) -> RoPE:
    """RoPE of a config with one rope for all layers; `context` is its longest document."""
    data = config.data
    table = data.get("rope_scaling") or data.get("rope_parameters") or {}
    table = {**table, "rope_theta": table.get("rope_theta") or config.number("rope_theta", theta)}
    if data.get("original_max_position_embeddings"):
        table["original_max_position_embeddings"] = data["original_max_position_embeddings"]
    fraction = table.get("partial_rotary_factor") or config.number("partial_rotary_factor", 1.0)
    return rope_from_table(table, context=context).replace(fraction=float(fraction))


def rope_from_table(table: Mapping[str, Any], *, context: int) -> RoPE:
    """RoPE of one `rope_parameters` table."""
    return RoPE(
        theta=float(table["rope_theta"]), scaling=_scaling(HfConfig(table), context=context)
    )


def rope_to_hf(rope: RoPE) -> dict[str, Any]:
    """`rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for 4."""
    scaling = scaling_to_hf(rope.scaling)
    partial = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    original = "original_max_position_embeddings"
    # Of this kind version 4 looks for the original context beside the table.
    beside = {original: scaling[original]} if scaling["rope_type"] == "longrope" else {}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **partial, **scaling},
        **partial,
        **beside,
    }


def scaling_to_hf(scaling: Scaling) -> dict[str, Any]:
    """A scaling as a `rope_scaling` table.

    Raises:
        ConfigError: transformers has no such scaling.
    """
    match scaling:
        case NoScaling():
            return {"rope_type": "default"}
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTK():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case YaRN():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_context,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                **({} if scaling.truncate else {"truncate": False}),
                **({} if scaling.attention is None else {"attention_factor": scaling.attention}),
            }
        case LongRoPE():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "original_max_position_embeddings": scaling.original_context,
                "factor": scaling.factor,
                **({} if scaling.attention is None else {"attention_factor": scaling.attention}),
            }
        case DividedFrequencies():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.divisors),
                "long_factor": list(scaling.divisors),
                "original_max_position_embeddings": 1,
                "factor": 1.0,
                "attention_factor": 1.0,
            }
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_context,
            }
    raise ConfigError(f"transformers has no RoPE scaling {type(scaling).__name__}")


def _scaling(table: HfConfig, *, context: int) -> Scaling:
    kind = table.data.get("rope_type") or table.data.get("type") or "default"
    original = table.integer("original_max_position_embeddings", context)
    match kind:
        case "default":
            return NoScaling()
        case "linear":
            return LinearScaling(factor=table.number("factor"))
        case "dynamic":
            return DynamicNTK(factor=table.number("factor"), original_context=context)
        case "yarn":
            return _yarn(table, original, context)
        case "longrope" | "su":
            return _longrope(table, original, context)
        case "llama3":
            return Llama3Scaling(
                factor=table.number("factor"),
                low=table.number("low_freq_factor"),
                high=table.number("high_freq_factor"),
                original_context=original,
            )
    raise ConfigError(f"config.json: unknown rope_type {kind!r}{did_you_mean(str(kind), KINDS)}")


def _yarn(table: HfConfig, original: int, context: int) -> Scaling:
    factor = table.number("factor", context / original)
    attention = table.maybe_number("attention_factor")
    mscale, mscale_all = table.maybe_number("mscale"), table.maybe_number("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        grown = math.log(max(factor, 1.0)) * 0.1
        attention = (grown * mscale + 1.0) / (grown * mscale_all + 1.0)
    return YaRN(
        factor=factor,
        original_context=original,
        beta_fast=table.maybe_number("beta_fast") or 32.0,
        beta_slow=table.maybe_number("beta_slow") or 1.0,
        truncate=table.flag("truncate", True),
        attention=attention,
    )


def _longrope(table: HfConfig, original: int, context: int) -> Scaling:
    short, long = (tuple(map(float, table.data[f"{k}_factor"])) for k in ("short", "long"))
    attention = table.maybe_number("attention_factor")
    if original == 1 and short == long and attention == 1.0:
        return DividedFrequencies(divisors=short)
    return LongRoPE(
        short=short,
        long=long,
        original_context=original,
        factor=table.number("factor", context / original),
        attention=attention,
    )
