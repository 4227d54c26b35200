"""Llama 1 to 3, and the many models of that layout: SmolLM2, TinyLlama, Yi.

RMSNorm before each branch, rotary grouped-query attention, SwiGLU, no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.models.family import Family, Gguf, HuggingFace, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import (
    attention_from_gguf,
    attention_from_hf,
    decoder_from_gguf,
    decoder_from_hf,
    fields_to_hf,
    gated,
    gguf_rules,
    hf_rules,
    metadata_to_gguf,
)
from treadle.models.moe_layout import dense_twin, mixture_from_gguf, mixture_to_gguf
from treadle.models.weights import Interleaved, Rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import SoftmaxOfTop
from treadle.nn.mixers.attention import Attention
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.llama",
    paper="Touvron et al. 2023, arXiv:2302.13971; Llama team 2024, arXiv:2407.21783",
    summary="Llama 1 to 3 and everything of that layout: SmolLM2, TinyLlama, Yi.",
    recipe="treadle chat smollm2-135m-instruct",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def tiny_llama(
    vocab: int,
    *,
    dim: int = 256,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int | None = None,
    hidden: int | None = None,
    context: int = 1024,
    theta: float = 10_000.0,
    tied: bool = True,
) -> Decoder:
    """A Llama of any size; `hidden` defaults to 8/3 dim, rounded up to a multiple of 32."""
    block = Block(
        mixer=Attention(heads=heads, kv_heads=kv_heads, positions=RoPE(theta=theta)),
        ffn=GatedMLP(hidden=hidden or -(-8 * dim // 96) * 32),
    )
    head = TiedHead() if tied else LinearHead()
    return Decoder(vocab=vocab, dim=dim, context=context, blocks=(block,) * layers, head=head)


def smollm2_135m() -> Decoder:
    """SmolLM2-135M: 134,515,008 parameters (Allal et al. 2025, arXiv:2502.02737)."""
    return tiny_llama(
        49_152, dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, context=8192, theta=1e5
    )


def smollm2_360m() -> Decoder:
    """SmolLM2-360M: 361,821,120 parameters."""
    return tiny_llama(
        49_152, dim=960, layers=32, heads=15, kv_heads=5, hidden=2560, context=8192, theta=1e5
    )


WINDOWED_CONTEXT = "attention.sliding_window.context_length"
"""treadle's own key."""


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `llama` describes."""
    hf = HfConfig(config)
    bias = hf.flag("attention_bias", False)
    attention = attention_from_hf(hf).replace(qkv_bias=bias, out_bias=bias)
    mixers = (attention,) * hf.integer("num_hidden_layers")
    return decoder_from_hf(hf, mixers, mlp_bias=hf.flag("mlp_bias", False))


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        **fields_to_hf(decoder, "llama"),
        "attention_bias": uniform_attention(decoder, "llama").qkv_bias,
        "mlp_bias": gated(decoder, "llama").bias,
    }


def from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `llama`: a Llama, Mistral or Mixtral."""
    attention = attention_from_gguf(header)
    dense = decoder_from_gguf(
        header, attention.replace(window=header.maybe_integer("attention.sliding_window"))
    )
    decoder = mixture_from_gguf(dense, header, SoftmaxOfTop())
    return decoder.replace(context=header.integer(WINDOWED_CONTEXT, decoder.context))


def to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `llama`.

    llama.cpp gives this architecture no window. A windowed model is written with a context no
    longer than its window, within which both compute the same; the true one is kept aside.
    """
    attention = uniform_attention(decoder, "llama")
    if attention.qkv_bias and not attention.out_bias:
        raise ConfigError("biases on queries, keys and values alone are Qwen 2's")
    metadata, divisors = metadata_to_gguf(dense_twin(decoder), "llama")
    metadata |= mixture_to_gguf(decoder)
    if attention.window is not None:
        metadata["attention.sliding_window"] = attention.window
        metadata["context_length"] = min(decoder.context, attention.window)
        metadata[WINDOWED_CONTEXT] = decoder.context
    return GgufHeader("llama", metadata, rope_divisors=divisors)


def interleaved_rules(decoder: Decoder) -> tuple[Rule, ...]:
    """GGUF's llama architecture stores queries and keys for the rotation of adjacent pairs."""
    attention = uniform_attention(decoder, "llama")
    turned = {
        f"blk.{layer}.attn_{name}.{kind}": Interleaved(heads)
        for layer in range(len(decoder.blocks))
        for name, heads in (("q", attention.heads), ("k", attention.kv_heads or attention.heads))
        for kind in ("weight", "bias")
    }
    return tuple(replace(r, map=turned.get(r.theirs[0], r.map)) for r in gguf_rules(decoder))


FAMILY = Family(
    name="llama",
    huggingface=HuggingFace(
        model_type="llama",
        architecture="LlamaForCausalLM",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="llama", read=from_gguf, write=to_gguf, rules=interleaved_rules),
)
