"""Mixtral: Mistral's layout, in every layer a mixture of eight experts of which two run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models import mistral
from treadle.models.decoder import Decoder, LinearHead, swap
from treadle.models.family import Family, HuggingFace
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import HF_RULES
from treadle.models.moe_layout import dense_twin, expert_rules, mixture
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE, SoftmaxOfTop
from treadle.nn.mixers.attention import Attention
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.mistral.mixtral",
    paper="Jiang et al. 2024, Mixtral of Experts, arXiv:2401.04088",
    summary="Mixtral: every layer a mixture of experts.",
    recipe="treadle show mixtral-8x7b",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def mixtral_8x7b() -> Decoder:
    """Mixtral 8x7B v0.1: 46,702,792,704 parameters, of which a token passes 12.9 billion."""
    block = Block(
        mixer=Attention(heads=32, kv_heads=8, head_dim=128, positions=RoPE(theta=1e6)),
        ffn=MoE(expert=GatedMLP(hidden=14_336), experts=8, top_k=2),
    )
    return Decoder(vocab=32_000, dim=4096, context=32_768, blocks=(block,) * 32, head=LinearHead())


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `mixtral` describes."""
    hf = HfConfig(config)
    experts, top_k = hf.integer("num_local_experts", 8), hf.integer("num_experts_per_tok", 2)
    dense = mistral.from_hf(config)
    decoder: Decoder = swap(
        dense, GatedMLP, lambda ffn: MoE(expert=ffn, experts=experts, top_k=top_k)
    )
    return decoder


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Mixtral."""
    moe = mixture(decoder, "mixtral")
    if moe.shared is not None or moe.router != SoftmaxOfTop():
        raise ConfigError("mixtral has a softmax over the chosen experts and no shared ones")
    return {
        **mistral.to_hf(dense_twin(decoder)),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    front = "model.layers.{i}.block_sparse_moe"
    own = (
        rule(f"{front}.gate.weight", "blocks.{i}.ffn.router.weight"),
        *expert_rules(decoder, f"{front}.experts", ("w1", "w3", "w2")),
    )
    return expand((*HF_RULES, *own), len(decoder.blocks))


FAMILY = Family(
    name="mixtral",
    huggingface=HuggingFace(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
    ),
    gguf=None,
)
