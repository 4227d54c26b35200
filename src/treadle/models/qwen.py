"""Qwen 1.5, 2, 2.5 (biases on q, k, v) and Qwen 3 dense (normed queries and keys, no biases)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder
from treadle.models.family import Family, Gguf, HuggingFace, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import (
    attention_from_gguf,
    attention_from_hf,
    decoder_from_gguf,
    decoder_from_hf,
    fields_to_hf,
    gguf_rules,
    hf_rules,
    metadata_to_gguf,
)
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import RMSNorm
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.qwen",
    paper="Qwen team 2024, arXiv:2412.15115 (2.5); Yang et al. 2025, arXiv:2505.09388 (3)",
    summary="Qwen 1.5 to 3, dense.",
    recipe="treadle show qwen3-0-6b",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def qwen2_5_0_5b() -> Decoder:
    """Qwen2.5-0.5B: 494,032,768 parameters."""
    norm = RMSNorm(eps=1e-6)
    mixer = Attention(heads=14, kv_heads=2, positions=RoPE(theta=1e6), qkv_bias=True)
    block = Block(mixer=mixer, ffn=GatedMLP(hidden=4864), norm=norm)
    return Decoder(vocab=151_936, dim=896, context=32_768, blocks=(block,) * 24, norm=norm)


def qwen3_0_6b() -> Decoder:
    """Qwen3-0.6B: 596,049,920 parameters."""
    norm = RMSNorm(eps=1e-6)
    mixer = Attention(heads=16, kv_heads=8, head_dim=128, positions=RoPE(theta=1e6), qk_norm=norm)
    block = Block(mixer=mixer, ffn=GatedMLP(hidden=3072), norm=norm)
    return Decoder(vocab=151_936, dim=1024, context=40_960, blocks=(block,) * 28, norm=norm)


def qwen2_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `qwen2` describes."""
    hf = HfConfig(config)
    return decoder_from_hf(hf, _windowed(hf, attention_from_hf(hf).replace(qkv_bias=True)))


def qwen3_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `qwen3` describes."""
    hf = HfConfig(config)
    bias = hf.flag("attention_bias", False)
    attention = attention_from_hf(hf, head_dim=128).replace(
        qk_norm=RMSNorm(eps=hf.number("rms_norm_eps", 1e-6)), qkv_bias=bias, out_bias=bias
    )
    return decoder_from_hf(hf, _windowed(hf, attention))


def qwen2_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Qwen 2."""
    return {**fields_to_hf(decoder, "qwen2"), **_window_fields(decoder)}


def qwen3_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Qwen 3."""
    bias = uniform_attention(decoder, "qwen3").qkv_bias
    return {
        **fields_to_hf(decoder, "qwen3"),
        **_window_fields(decoder),
        "attention_bias": bias,
    }


def _windowed(hf: HfConfig, attention: Attention) -> tuple[Attention, ...]:
    """The attention of each layer: the first `max_window_layers` see everything."""
    layers = hf.integer("num_hidden_layers")
    window = hf.maybe_integer("sliding_window") if hf.flag("use_sliding_window", False) else None
    first = hf.integer("max_window_layers", 28)
    usual = tuple("full" if i < first else "sliding" for i in range(layers))
    kinds = hf.data.get("layer_types") or usual
    sliding = attention.replace(window=window)
    return tuple(sliding if kind.startswith("sliding") else attention for kind in kinds)


def _window_fields(decoder: Decoder) -> dict[str, Any]:
    mixers = [b.mixer for b in decoder.blocks if isinstance(b.mixer, Attention)]
    full = [m.window is None for m in mixers]
    return {
        "use_sliding_window": not all(full),
        "sliding_window": next((m.window for m in mixers if m.window is not None), None),
        "max_window_layers": full.index(False) if False in full else len(full),
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
    }


def qwen2_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `qwen2`."""
    return decoder_from_gguf(header, attention_from_gguf(header))


def qwen3_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `qwen3`."""
    norm = RMSNorm(eps=header.number("attention.layer_norm_rms_epsilon"))
    return decoder_from_gguf(header, attention_from_gguf(header).replace(qk_norm=norm))


def qwen2_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `qwen2`, which always has the biases of Qwen 2."""
    attention = uniform_attention(decoder, "qwen2")
    if attention.out_bias or not attention.qkv_bias:
        raise ConfigError("qwen2 has biases on queries, keys and values, and no others")
    metadata, divisors = metadata_to_gguf(decoder, "qwen2")
    return GgufHeader("qwen2", metadata, rope_divisors=divisors)


def qwen3_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `qwen3`, for which llama.cpp has no biases."""
    if uniform_attention(decoder, "qwen3").qkv_bias:
        raise ConfigError("llama.cpp has no biases in qwen3")
    metadata, divisors = metadata_to_gguf(decoder, "qwen3")
    return GgufHeader("qwen3", metadata, rope_divisors=divisors)


QWEN2 = Family(
    name="qwen2",
    huggingface=HuggingFace(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        read=qwen2_from_hf,
        write=qwen2_to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="qwen2", read=qwen2_from_gguf, write=qwen2_to_gguf, rules=gguf_rules),
)

QWEN3 = Family(
    name="qwen3",
    huggingface=HuggingFace(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        read=qwen3_from_hf,
        write=qwen3_to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="qwen3", read=qwen3_from_gguf, write=qwen3_to_gguf, rules=gguf_rules),
)
