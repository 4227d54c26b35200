"""Gemma 1, 2 and 3 (text): Llama's parts with norms that multiply by 1 + w, GeGLU, heads wider
than dim / heads, and embeddings scaled by sqrt(dim).

Gemma 2 adds norms behind each branch, soft caps on scores and logits, and a window in every other
layer. Gemma 3 drops the caps, norms queries and keys, gives five of six layers a window, and
rotates windowed layers with a theta of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from treadle.core.cards import Card
from treadle.kernels.gated import Activation
from treadle.models.decoder import Decoder
from treadle.models.family import Family, HuggingFace, uniform_attention
from treadle.models.gemma_gguf import (
    GEMMA2_GGUF,
    GEMMA2_PERIOD,
    GEMMA3_GGUF,
    GEMMA3_PERIOD,
    GEMMA_GGUF,
)
from treadle.models.hub.hf_config import HfConfig
from treadle.models.hub.hf_rope import rope_from_table, rope_to_hf
from treadle.models.llama_layout import attention_from_hf, fields_to_hf
from treadle.models.llama_layout import hf_rules as llama_rules
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import Placement, PreNorm, RMSNorm, SandwichNorm
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.gemma",
    paper="Gemma team 2024, arXiv:2403.08295, arXiv:2408.00118 (2); 2025, arXiv:2503.19786 (3)",
    summary="Gemma 1, 2 and 3, text.",
    recipe="treadle show gemma3-270m",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def gemma3_270m() -> Decoder:
    """Gemma 3 270M: 268,098,176 parameters."""
    norm = RMSNorm(eps=1e-6, offset=1.0)
    full = Attention(heads=4, kv_heads=1, head_dim=256, positions=RoPE(theta=1e6), qk_norm=norm)
    sliding = full.replace(window=512, positions=RoPE())
    block = Block(
        mixer=full,
        ffn=GatedMLP(hidden=2048, activation="gelu_tanh"),
        norm=norm,
        placement=SandwichNorm(),
    )
    windowed = block.replace(mixer=sliding)
    return Decoder(
        vocab=262_144,
        dim=640,
        context=32_768,
        blocks=((windowed,) * 5 + (block,)) * 3,
        norm=norm,
        embedding_scale=640**0.5,
    )


def gemma_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `gemma` describes."""
    hf = HfConfig(config)
    return _decoder(hf, (_attention(hf),) * hf.integer("num_hidden_layers"), PreNorm())


def gemma2_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `gemma2` describes."""
    hf = HfConfig(config)
    full = _attention(hf).replace(
        scale=hf.number("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=_cap(hf, "attn_logit_softcapping", 50.0),
    )
    sliding = full.replace(window=hf.integer("sliding_window", 4096))
    mixers = _alternate(hf, full, sliding, GEMMA2_PERIOD)
    decoder = _decoder(hf, mixers, SandwichNorm())
    return decoder.replace(softcap=_cap(hf, "final_logit_softcapping", 30.0))


def gemma3_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `gemma3_text` describes."""
    hf = HfConfig(config)
    positions, local = _gemma3_ropes(hf)
    full = _attention(hf).replace(
        scale=hf.number("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=hf.maybe_number("attn_logit_softcapping"),
        qk_norm=_norm(hf),
        positions=positions,
    )
    sliding = full.replace(window=hf.integer("sliding_window", 4096), positions=local)
    period = hf.integer("sliding_window_pattern", GEMMA3_PERIOD)
    decoder = _decoder(hf, _alternate(hf, full, sliding, period), SandwichNorm())
    return decoder.replace(softcap=hf.maybe_number("final_logit_softcapping"))


def gemma_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Gemma 1."""
    fields = fields_to_hf(decoder, "gemma")
    return {
        **fields,
        "hidden_activation": fields["hidden_act"],
        "attention_bias": uniform_attention(decoder, "gemma").qkv_bias,
    }


def gemma2_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Gemma 2."""
    attention = uniform_attention(decoder, "gemma2")
    mixers = _mixers(decoder)
    head_dim = attention.head_dim or decoder.dim // attention.heads
    return {
        **gemma_to_hf(decoder),
        "query_pre_attn_scalar": round(attention.scale**-2) if attention.scale else head_dim,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": decoder.softcap,
        "sliding_window": next((m.window for m in mixers if m.window), None),
        "layer_types": [f"{_kind(m)}_attention" for m in mixers],
    }


def gemma3_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Gemma 3."""
    thetas = {"full": 1e6, "sliding": 1e4}
    ropes = {kind: RoPE(theta=theta) for kind, theta in thetas.items()}
    for mixer in _mixers(decoder):
        if isinstance(mixer.positions, RoPE):
            ropes[_kind(mixer)] = mixer.positions
    full, local = rope_to_hf(ropes["full"]), rope_to_hf(ropes["sliding"])
    return {
        **gemma2_to_hf(decoder),
        **full,
        "rope_parameters": {
            "full_attention": full["rope_parameters"],
            "sliding_attention": local["rope_parameters"],
        },
        "rope_local_base_freq": ropes["sliding"].theta,
    }


def _attention(hf: HfConfig) -> Attention:
    hf.refuse("use_bidirectional_attention", False)
    bias = hf.flag("attention_bias", False)
    return attention_from_hf(hf, head_dim=256).replace(qkv_bias=bias, out_bias=bias)


def _gemma3_ropes(hf: HfConfig) -> tuple[RoPE, RoPE]:
    """Of full and of windowed layers; a scaling in the old form means the full ones."""
    context = hf.integer("max_position_embeddings", 131_072)
    tables = hf.data.get("rope_parameters") or {}
    full = {
        "rope_theta": hf.number("rope_theta", 1e6),
        **(hf.data.get("rope_scaling") or {}),
        **(tables.get("full_attention") or {}),
    }
    local = {
        "rope_theta": hf.number("rope_local_base_freq", 1e4),
        **(tables.get("sliding_attention") or {}),
    }
    return rope_from_table(full, context=context), rope_from_table(local, context=context)


def _alternate(
    hf: HfConfig, full: Attention, sliding: Attention, period: int
) -> tuple[Attention, ...]:
    """The attention of each layer, as `layer_types` says, else one full in each `period`."""
    kinds = hf.data.get("layer_types") or [
        "full" if (i + 1) % period == 0 else "sliding"
        for i in range(hf.integer("num_hidden_layers"))
    ]
    return tuple(sliding if str(kind).startswith("sliding") else full for kind in kinds)


def _decoder(hf: HfConfig, mixers: Sequence[Attention], placement: Placement) -> Decoder:
    dim, norm = hf.integer("hidden_size"), _norm(hf)
    act: Activation = hf.activation(
        "hidden_activation" if hf.data.get("hidden_activation") else "hidden_act", "gelu_new"
    )
    # Early configs say "gelu" for the tanh approximation that the models were trained with.
    ffn = GatedMLP(
        hidden=hf.integer("intermediate_size"),
        activation="gelu_tanh" if act == "gelu" else act,
        bias=False,
    )
    return Decoder(
        vocab=hf.integer("vocab_size"),
        dim=dim,
        context=hf.integer("max_position_embeddings", 8192),
        blocks=tuple(Block(mixer=m, ffn=ffn, norm=norm, placement=placement) for m in mixers),
        norm=norm,
        head=hf.head(tied=True),
        embedding_scale=math.sqrt(dim),
        std=hf.number("initializer_range", 0.02),
    )


def _norm(hf: HfConfig) -> RMSNorm:
    return RMSNorm(eps=hf.number("rms_norm_eps", 1e-6), offset=1.0)


def _cap(hf: HfConfig, key: str, default: float) -> float | None:
    """A soft cap: null means none, absent means the default."""
    return hf.maybe_number(key) if key in hf.data else default


def _mixers(decoder: Decoder) -> tuple[Attention, ...]:
    return tuple(b.mixer for b in decoder.blocks if isinstance(b.mixer, Attention))


def _kind(attention: Attention) -> str:
    return "full" if attention.window is None else "sliding"


SANDWICH_RULES = (
    rule("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.mixer_norms.after.weight"),
    rule("model.layers.{i}.pre_feedforward_layernorm.weight", "blocks.{i}.ffn_norms.before.weight"),
    rule("model.layers.{i}.post_feedforward_layernorm.weight", "blocks.{i}.ffn_norms.after.weight"),
)


def sandwich_rules(decoder: Decoder) -> tuple[Rule, ...]:
    """Llama's names but for the norms: Gemma 2 calls another one post_attention_layernorm."""
    named = expand(SANDWICH_RULES, len(decoder.blocks))
    taken = {r.ours for r in named}
    return (*(r for r in llama_rules(decoder) if r.ours not in taken), *named)


GEMMA = Family(
    name="gemma",
    huggingface=HuggingFace(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        read=gemma_from_hf,
        write=gemma_to_hf,
        rules=llama_rules,
    ),
    gguf=GEMMA_GGUF,
)

GEMMA2 = Family(
    name="gemma2",
    huggingface=HuggingFace(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        read=gemma2_from_hf,
        write=gemma2_to_hf,
        rules=sandwich_rules,
    ),
    gguf=GEMMA2_GGUF,
)

GEMMA3 = Family(
    name="gemma3",
    huggingface=HuggingFace(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        scorer="Gemma3TextForSequenceClassification",
        read=gemma3_from_hf,
        write=gemma3_to_hf,
        rules=sandwich_rules,
    ),
    gguf=GEMMA3_GGUF,
)
