"""What Llama, Mistral and Qwen spell alike, in config.json and in GGUF.

The families differ in biases, norms of queries and keys, and windows: in their attention. Each
builds the attention of every layer and leaves the rest to this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.models.family import uniform_attention
from treadle.models.hub.gguf_header import GgufHeader, rope_from_gguf, rope_to_gguf
from treadle.models.hub.hf_config import HfConfig, activation_name
from treadle.models.hub.hf_rope import rope_from_hf, rope_to_hf
from treadle.models.moe_layout import GGUF_EXPERT_RULES
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import RMSNorm
from treadle.nn.rope import RoPE


def attention_from_hf(hf: HfConfig, head_dim: int | None = None) -> Attention:
    """Attention without biases; `head_dim` is what the config means where it states none."""
    heads, dim = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    context = hf.integer("max_position_embeddings", 2048)
    return Attention(
        heads=heads,
        kv_heads=hf.integer("num_key_value_heads", heads),
        head_dim=hf.integer("head_dim", head_dim or dim // heads),
        positions=rope_from_hf(hf, context=context),
    )


def decoder_from_hf(
    hf: HfConfig, mixers: Sequence[Attention], *, mlp_bias: bool = False
) -> Decoder:
    """The decoder with these mixers, one a layer."""
    norm = RMSNorm(eps=hf.number("rms_norm_eps", 1e-6))
    ffn = GatedMLP(
        hidden=hf.integer("intermediate_size"),
        activation=hf.activation("hidden_act", "silu"),
        bias=mlp_bias,
    )
    return Decoder(
        vocab=hf.integer("vocab_size"),
        dim=hf.integer("hidden_size"),
        context=hf.integer("max_position_embeddings", 2048),
        blocks=tuple(Block(mixer=mixer, ffn=ffn, norm=norm) for mixer in mixers),
        norm=norm,
        head=hf.head(tied=False),
        std=hf.number("initializer_range", 0.02),
    )


def fields_to_hf(decoder: Decoder, family: str) -> dict[str, Any]:
    """The keys of config.json that the families share."""
    attention, ffn = uniform_attention(decoder, family), gated(decoder, family)
    return {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": len(decoder.blocks),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim or decoder.dim // attention.heads,
        "hidden_act": activation_name(ffn.activation),
        "max_position_embeddings": decoder.context,
        "rms_norm_eps": rms_eps(decoder, family),
        "tie_word_embeddings": isinstance(decoder.head, TiedHead),
        "initializer_range": decoder.std,
        **rope_to_hf(rotary(attention, family)),
    }


def attention_from_gguf(header: GgufHeader) -> Attention:
    """Attention without norms, with biases where the file has them."""
    heads, dim = header.integer("attention.head_count"), header.integer("embedding_length")
    head_dim = header.integer("attention.key_length", dim // heads)
    return Attention(
        heads=heads,
        kv_heads=header.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        positions=rope_from_gguf(header, head_dim),
        qkv_bias="blk.0.attn_q.bias" in header.shapes,
        out_bias="blk.0.attn_output.bias" in header.shapes,
    )


def decoder_from_gguf(header: GgufHeader, mixer: Attention) -> Decoder:
    """The decoder with this mixer in every layer."""
    norm = RMSNorm(eps=header.number("attention.layer_norm_rms_epsilon"))
    ffn = GatedMLP(
        hidden=header.integer("feed_forward_length"), bias="blk.0.ffn_gate.bias" in header.shapes
    )
    return Decoder(
        vocab=header.vocab(),
        dim=header.integer("embedding_length"),
        context=header.integer("context_length"),
        blocks=(Block(mixer=mixer, ffn=ffn, norm=norm),) * header.integer("block_count"),
        norm=norm,
        head=LinearHead() if "output.weight" in header.shapes else TiedHead(),
    )


def metadata_to_gguf(
    decoder: Decoder, family: str
) -> tuple[dict[str, Any], Float[Tensor, " half"] | None]:
    """The metadata that the architectures share, and `rope_freqs.weight` where it is needed."""
    attention = uniform_attention(decoder, family)
    head_dim = attention.head_dim or decoder.dim // attention.heads
    rope, divisors = rope_to_gguf(rotary(attention, family), head_dim)
    return {
        "block_count": len(decoder.blocks),
        "context_length": decoder.context,
        "embedding_length": decoder.dim,
        "feed_forward_length": gated(decoder, family).hidden,
        "vocab_size": decoder.vocab,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads or attention.heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": rms_eps(decoder, family),
        **rope,
    }, divisors


def gated(decoder: Decoder, family: str) -> GatedMLP:
    """The gated feed-forward of the first block."""
    ffn = decoder.blocks[0].ffn
    if not isinstance(ffn, GatedMLP):
        raise ConfigError(f"{family} has gated feed-forwards, not {ffn!r}")
    return ffn


def rotary(attention: Attention, family: str) -> RoPE:
    """The rotary positions of an attention."""
    if not isinstance(attention.positions, RoPE):
        raise ConfigError(f"{family} has rotary positions, not {attention.positions!r}")
    return attention.positions


def rms_eps(decoder: Decoder, family: str) -> float:
    """The epsilon of the final norm."""
    if not isinstance(decoder.norm, RMSNorm):
        raise ConfigError(f"{family} has RMSNorm, not {decoder.norm!r}")
    return decoder.norm.eps


HF_RULES = (
    rule("model.embed_tokens.weight", "embedding.weight"),
    rule("model.norm.weight", "norm.weight"),
    rule("lm_head.weight", "head.weight"),
    rule("model.layers.{i}.input_layernorm.weight", "blocks.{i}.mixer_norms.before.weight"),
    rule("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.ffn_norms.before.weight"),
    *(
        rule(f"model.layers.{{i}}.self_attn.{n}_proj.{kind}", f"blocks.{{i}}.mixer.{n}.{kind}")
        for n in "qkvo"
        for kind in ("weight", "bias")
    ),
    rule("model.layers.{i}.self_attn.q_norm.weight", "blocks.{i}.mixer.q_norm.weight"),
    rule("model.layers.{i}.self_attn.k_norm.weight", "blocks.{i}.mixer.k_norm.weight"),
    *(
        rule(f"model.layers.{{i}}.mlp.{n}_proj.{kind}", f"blocks.{{i}}.ffn.{n}.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
)
"""All that any of the families has; a model uses the rules whose parameters it owns."""

GGUF_RULES = (
    rule("token_embd.weight", "embedding.weight"),
    rule("output_norm.weight", "norm.weight"),
    rule("output.weight", "head.weight"),
    rule("blk.{i}.attn_norm.weight", "blocks.{i}.mixer_norms.before.weight"),
    rule("blk.{i}.ffn_norm.weight", "blocks.{i}.ffn_norms.before.weight"),
    *(
        rule(f"blk.{{i}}.attn_{theirs}.{kind}", f"blocks.{{i}}.mixer.{ours}.{kind}")
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
        for kind in ("weight", "bias")
    ),
    rule("blk.{i}.attn_q_norm.weight", "blocks.{i}.mixer.q_norm.weight"),
    rule("blk.{i}.attn_k_norm.weight", "blocks.{i}.mixer.k_norm.weight"),
    *(
        rule(f"blk.{{i}}.ffn_{n}.{kind}", f"blocks.{{i}}.ffn.{n}.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    *GGUF_EXPERT_RULES,
)


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    return expand(HF_RULES, len(decoder.blocks))


def gguf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    return expand(GGUF_RULES, len(decoder.blocks))
