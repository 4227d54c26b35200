"""Qwen's mixtures of experts: Qwen 1.5 and 2 with gated shared experts, Qwen 3 without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models import qwen
from treadle.models.decoder import Decoder, LinearHead
from treadle.models.family import Family, Gguf, HuggingFace, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import (
    HF_RULES,
    attention_from_hf,
    decoder_from_hf,
    fields_to_hf,
    gguf_rules,
)
from treadle.models.moe_layout import (
    dense_hidden,
    dense_twin,
    expert_rules,
    mixture,
    mixture_from_gguf,
    mixture_to_gguf,
)
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import FeedForward, GatedMLP
from treadle.nn.ffn.moe import MoE, Router, SigmoidGated, SoftmaxOfTop, TopOfSoftmax
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import RMSNorm
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.qwen.moe",
    paper="Qwen team 2024, arXiv:2407.10671 (2); Yang et al. 2025, arXiv:2505.09388 (3)",
    summary="Qwen 2 and 3 with mixtures of experts, shared experts and dense layers between.",
    recipe="treadle show qwen3-30b-a3b",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def qwen3_30b_a3b() -> Decoder:
    """Qwen3-30B-A3B: 30,532,122,624 parameters, of which a token passes 3.3 billion."""
    norm = RMSNorm(eps=1e-6)
    mixer = Attention(heads=32, kv_heads=4, head_dim=128, positions=RoPE(theta=1e6), qk_norm=norm)
    ffn = MoE(expert=GatedMLP(hidden=768), experts=128, top_k=8)
    block = Block(mixer=mixer, ffn=ffn, norm=norm)
    return Decoder(
        vocab=151_936,
        dim=2048,
        context=40_960,
        blocks=(block,) * 48,
        norm=norm,
        head=LinearHead(),
    )


def qwen2_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `qwen2_moe` describes."""
    hf = HfConfig(config)
    shared = GatedMLP(
        hidden=hf.integer("shared_expert_intermediate_size"),
        activation=hf.activation("hidden_act", "silu"),
    )
    mixer = attention_from_hf(hf).replace(qkv_bias=hf.flag("qkv_bias", True))
    return _decoder(hf, mixer, SigmoidGated(ffn=shared))


def qwen3_from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `qwen3_moe` describes."""
    hf = HfConfig(config)
    bias = hf.flag("attention_bias", False)
    norm = RMSNorm(eps=hf.number("rms_norm_eps", 1e-6))
    mixer = attention_from_hf(hf).replace(qk_norm=norm, qkv_bias=bias, out_bias=bias)
    return _decoder(hf, mixer, None)


def _decoder(hf: HfConfig, mixer: Attention, shared: FeedForward | None) -> Decoder:
    hf.refuse("use_sliding_window", False)
    layers, step = hf.integer("num_hidden_layers"), hf.integer("decoder_sparse_step", 1)
    dense = decoder_from_hf(hf, (mixer,) * layers)
    router: Router = SoftmaxOfTop() if hf.flag("norm_topk_prob", False) else TopOfSoftmax()
    moe = MoE(
        expert=GatedMLP(
            hidden=hf.integer("moe_intermediate_size"),
            activation=hf.activation("hidden_act", "silu"),
        ),
        experts=hf.integer("num_experts", hf.integer("num_local_experts", 128)),
        top_k=hf.integer("num_experts_per_tok"),
        router=router,
        shared=shared,
    )
    only_dense = set(hf.data.get("mlp_only_layers") or ())
    blocks = tuple(
        block if i in only_dense or (i + 1) % step else block.replace(ffn=moe)
        for i, block in enumerate(dense.blocks)
    )
    return dense.replace(blocks=blocks)


def qwen2_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Qwen 2 mixture."""
    shared = mixture(decoder, "qwen2_moe").shared
    if not isinstance(shared, SigmoidGated) or not isinstance(shared.ffn, GatedMLP):
        raise ConfigError("qwen2_moe has shared experts behind a sigmoid")
    return {
        **_fields(decoder, "qwen2_moe"),
        "shared_expert_intermediate_size": shared.ffn.hidden,
        "qkv_bias": uniform_attention(decoder, "qwen2_moe").qkv_bias,
    }


def qwen3_to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Qwen 3 mixture."""
    bias = uniform_attention(decoder, "qwen3_moe").qkv_bias
    return {**_fields(decoder, "qwen3_moe"), "attention_bias": bias}


def _fields(decoder: Decoder, family: str) -> dict[str, Any]:
    moe = mixture(decoder, family)
    if not isinstance(moe.router, SoftmaxOfTop | TopOfSoftmax):
        raise ConfigError(f"{family} routes by softmax")
    dense = [i for i, block in enumerate(decoder.blocks) if not isinstance(block.ffn, MoE)]
    return {
        **fields_to_hf(dense_twin(decoder), family),
        "intermediate_size": dense_hidden(decoder, moe.expert.hidden),
        "moe_intermediate_size": moe.expert.hidden,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": isinstance(moe.router, SoftmaxOfTop),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": False,
    }


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    front = "model.layers.{i}.mlp"
    shared = (
        rule(f"{front}.shared_expert.{n}_proj.weight", f"blocks.{{i}}.ffn.shared.ffn.{n}.weight")
        for n in ("gate", "up", "down")
    )
    own = (
        rule(f"{front}.gate.weight", "blocks.{i}.ffn.router.weight"),
        rule(f"{front}.shared_expert_gate.weight", "blocks.{i}.ffn.shared.switch.weight"),
        *shared,
        *expert_rules(decoder, f"{front}.experts", ("gate_proj", "up_proj", "down_proj")),
    )
    return expand((*HF_RULES, *own), len(decoder.blocks))


def qwen2_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `qwen2moe`."""
    hidden = header.integer("expert_shared_feed_forward_length")
    shared = SigmoidGated(ffn=GatedMLP(hidden=hidden))
    return mixture_from_gguf(qwen.qwen2_from_gguf(header), header, TopOfSoftmax(), shared)


def qwen3_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `qwen3moe`."""
    return mixture_from_gguf(qwen.qwen3_from_gguf(header), header, SoftmaxOfTop())


def qwen2_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `qwen2moe`."""
    shared = mixture(decoder, "qwen2moe").shared
    if not isinstance(shared, SigmoidGated) or not isinstance(shared.ffn, GatedMLP):
        raise ConfigError("qwen2moe has shared experts behind a sigmoid")
    header = qwen.qwen2_to_gguf(dense_twin(decoder))
    more = {"expert_shared_feed_forward_length": shared.ffn.hidden}
    return _with_experts("qwen2moe", header, decoder, more)


def qwen3_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `qwen3moe`, where each layer is a mixture without shared experts."""
    header = qwen.qwen3_to_gguf(dense_twin(decoder))
    return _with_experts("qwen3moe", header, decoder)


def _with_experts(
    architecture: str,
    header: GgufHeader,
    decoder: Decoder,
    more: Mapping[str, int] = MappingProxyType({}),
) -> GgufHeader:
    metadata = {**header.metadata, **mixture_to_gguf(decoder), **more}
    return replace(header, architecture=architecture, metadata=metadata)


QWEN2_MOE = Family(
    name="qwen2_moe",
    huggingface=HuggingFace(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        read=qwen2_from_hf,
        write=qwen2_to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="qwen2moe", read=qwen2_from_gguf, write=qwen2_to_gguf, rules=gguf_rules),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    huggingface=HuggingFace(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        read=qwen3_from_hf,
        write=qwen3_to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="qwen3moe", read=qwen3_from_gguf, write=qwen3_to_gguf, rules=gguf_rules),
)
