"""OLMoE: Llama's layout, 64 small experts a layer, one norm over the queries of all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, LinearHead, swap
from treadle.models.family import Family, Gguf, HuggingFace, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import (
    GGUF_RULES,
    HF_RULES,
    attention_from_gguf,
    attention_from_hf,
    decoder_from_gguf,
    decoder_from_hf,
    fields_to_hf,
    metadata_to_gguf,
)
from treadle.models.moe_layout import (
    dense_twin,
    expert_rules,
    mixture,
    mixture_from_gguf,
    mixture_to_gguf,
)
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE, Router, SoftmaxOfTop, TopOfSoftmax
from treadle.nn.mixers.attention import AcrossHeads, Attention
from treadle.nn.norms import RMSNorm

CARD = Card(
    id="arch.moe.olmoe",
    paper="Muennighoff et al. 2024, OLMoE, arXiv:2409.02060",
    summary="OLMoE: every layer 64 small experts; queries and keys normalised over all heads.",
    recipe="treadle show olmoe-1b-7b",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def olmoe_1b_7b() -> Decoder:
    """OLMoE-1B-7B: 6,919,161,856 parameters, of which a token passes 1.3 billion."""
    norm = RMSNorm(eps=1e-5)
    block = Block(
        mixer=Attention(heads=16, qk_norm=AcrossHeads(norm=norm)),
        ffn=MoE(expert=GatedMLP(hidden=1024), experts=64, top_k=8, router=TopOfSoftmax()),
        norm=norm,
    )
    return Decoder(
        vocab=50_304, dim=2048, context=4096, blocks=(block,) * 16, norm=norm, head=LinearHead()
    )


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `olmoe` describes."""
    hf = HfConfig({"rms_norm_eps": 1e-5, **config})
    hf.refuse("clip_qkv")
    bias = hf.flag("attention_bias", False)
    norm = AcrossHeads(norm=RMSNorm(eps=hf.number("rms_norm_eps")))
    mixer = attention_from_hf(hf).replace(qk_norm=norm, qkv_bias=bias, out_bias=bias)
    experts, top_k = hf.integer("num_experts", 64), hf.integer("num_experts_per_tok", 8)
    router: Router = SoftmaxOfTop() if hf.flag("norm_topk_prob", False) else TopOfSoftmax()
    mixed: Decoder = swap(
        decoder_from_hf(hf, (mixer,) * hf.integer("num_hidden_layers")),
        GatedMLP,
        lambda ffn: MoE(expert=ffn, experts=experts, top_k=top_k, router=router),
    )
    return mixed


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of an OLMoE."""
    moe = mixture(decoder, "olmoe")
    return {
        **fields_to_hf(dense_twin(decoder), "olmoe"),
        "attention_bias": uniform_attention(decoder, "olmoe").qkv_bias,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": isinstance(moe.router, SoftmaxOfTop),
        "clip_qkv": None,
    }


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    front = "model.layers.{i}.mlp"
    own = (
        *_norm_rules("model.layers.{i}.self_attn.{n}_norm.weight"),
        rule(f"{front}.gate.weight", "blocks.{i}.ffn.router.weight"),
        *expert_rules(decoder, f"{front}.experts", ("gate_proj", "up_proj", "down_proj")),
    )
    return expand((*HF_RULES, *own), len(decoder.blocks))


def gguf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    own = _norm_rules("blk.{i}.attn_{n}_norm.weight")
    return expand((*GGUF_RULES, *own), len(decoder.blocks))


def _norm_rules(theirs: str) -> tuple[Rule, ...]:
    ours = "blocks.{i}.mixer.{n}_norm.norm.weight"
    return tuple(rule(theirs.replace("{n}", n), ours.replace("{n}", n)) for n in "qk")


def from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `olmoe`."""
    norm = RMSNorm(eps=header.number("attention.layer_norm_rms_epsilon"))
    mixer = attention_from_gguf(header).replace(qk_norm=AcrossHeads(norm=norm))
    return mixture_from_gguf(decoder_from_gguf(header, mixer), header, TopOfSoftmax())


def to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `olmoe`, for which llama.cpp has no biases and no grouped heads."""
    dense = dense_twin(decoder)
    attention = uniform_attention(dense, "olmoe")
    if attention.qkv_bias or attention.kv_heads not in (None, attention.heads):
        raise ConfigError("llama.cpp has no biases in olmoe, and as many key-value heads as heads")
    metadata, divisors = metadata_to_gguf(dense, "olmoe")
    metadata |= mixture_to_gguf(decoder)
    return GgufHeader("olmoe", metadata, rope_divisors=divisors)


FAMILY = Family(
    name="olmoe",
    huggingface=HuggingFace(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
    ),
    gguf=Gguf(architecture="olmoe", read=from_gguf, write=to_gguf, rules=gguf_rules),
)
