"""Mistral 7B and its kin: Llama's layout, and attention that sees only the last window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.cards import Card
from treadle.models import llama
from treadle.models.decoder import Decoder, LinearHead
from treadle.models.family import Family, HuggingFace, uniform_attention
from treadle.models.hub.hf_config import HfConfig
from treadle.models.llama_layout import attention_from_hf, decoder_from_hf, fields_to_hf, hf_rules
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.rope import RoPE

CARD = Card(
    id="model.mistral",
    paper="Jiang et al. 2023, Mistral 7B, arXiv:2310.06825",
    summary="Mistral: Llama's layout with sliding-window attention.",
    recipe="treadle show mistral-7b",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def mistral_7b() -> Decoder:
    """Mistral 7B v0.1: 7,241,732,096 parameters, window 4096."""
    block = Block(
        mixer=Attention(heads=32, kv_heads=8, head_dim=128, positions=RoPE(), window=4096),
        ffn=GatedMLP(hidden=14_336),
    )
    return Decoder(vocab=32_000, dim=4096, context=32_768, blocks=(block,) * 32, head=LinearHead())


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `mistral` describes."""
    hf = HfConfig(config)
    attention = attention_from_hf(hf).replace(window=hf.maybe_integer("sliding_window"))
    return decoder_from_hf(hf, (attention,) * hf.integer("num_hidden_layers"))


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a Mistral."""
    window = uniform_attention(decoder, "mistral").window
    return {**fields_to_hf(decoder, "mistral"), "sliding_window": window}


FAMILY = Family(
    name="mistral",
    huggingface=HuggingFace(
        model_type="mistral",
        architecture="MistralForCausalLM",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
    ),
    gguf=llama.FAMILY.gguf,
)
"""To llama.cpp a Mistral is a Llama."""
