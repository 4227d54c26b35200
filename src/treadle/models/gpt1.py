"""GPT-1: GPT-2's parts, with the norms after each branch and none before the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.models.decoder import Decoder, TiedHead
from treadle.models.family import Family, HuggingFace
from treadle.models.gpt2 import conv1d_rules, gpt2, parts
from treadle.models.hub.hf_config import HfConfig
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm, NoNorm, PostNorm
from treadle.nn.positions import NoPositions


def gpt1_117m() -> Decoder:
    """The model of Radford et al. 2018: 116,534,784 parameters."""
    decoder = gpt2(vocab=40_478, context=512)
    block = decoder.blocks[0].replace(placement=PostNorm())
    return decoder.replace(blocks=(block,) * 12, norm=NoNorm())


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `openai-gpt` describes."""
    hf = HfConfig(config)
    dim, heads = hf.integer("n_embd", 768), hf.integer("n_head", 12)
    # This config says "gelu" for the tanh approximation.
    gelu = hf.data.get("afn", "gelu") == "gelu"
    block = Block(
        mixer=Attention(heads=heads, positions=NoPositions(), qkv_bias=True, out_bias=True),
        ffn=MLP(
            hidden=4 * dim, activation="gelu_tanh" if gelu else hf.activation("afn", "gelu_new")
        ),
        norm=LayerNorm(eps=hf.number("layer_norm_epsilon", 1e-5)),
        placement=PostNorm(),
    )
    return Decoder(
        vocab=hf.integer("vocab_size"),
        dim=dim,
        context=hf.integer("n_positions", 512),
        blocks=(block,) * hf.integer("n_layer", 12),
        norm=NoNorm(),
        head=hf.head(tied=True),
        learned_positions=True,
        std=hf.number("initializer_range", 0.02),
    )


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a GPT-1."""
    attention, mlp, eps = parts(decoder, "openai-gpt")
    return {
        "vocab_size": decoder.vocab,
        "n_positions": decoder.context,
        "n_embd": decoder.dim,
        "n_layer": len(decoder.blocks),
        "n_head": attention.heads,
        "afn": "gelu" if mlp.activation == "gelu_tanh" else mlp.activation,
        "layer_norm_epsilon": eps,
        "initializer_range": decoder.std,
        "tie_word_embeddings": isinstance(decoder.head, TiedHead),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    return (
        rule("transformer.tokens_embed.weight", "embedding.weight"),
        rule("transformer.positions_embed.weight", "position.weight"),
        rule("lm_head.weight", "head.weight"),
        *expand(conv1d_rules(decoder), len(decoder.blocks)),
    )


FAMILY = Family(
    name="openai-gpt",
    huggingface=HuggingFace(
        model_type="openai-gpt",
        architecture="OpenAIGPTLMHeadModel",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
        prefix="transformer.",
        ignored=("*.attn.bias",),
    ),
    gguf=None,
)
