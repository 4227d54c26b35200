"""GPT-2 and GPT-3: LayerNorm before each branch, learned positions, GELU, biases everywhere.

The checkpoints keep matrices transposed, `[in, out]`, and q, k and v as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.models.family import Family, Gguf, HuggingFace, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.hub.hf_config import HfConfig
from treadle.models.weights import Chain, Fused, Rule, Transposed, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm
from treadle.nn.positions import NoPositions

CARD = Card(
    id="model.gpt",
    paper="Radford et al. 2018, 2019; Brown et al. 2020, arXiv:2005.14165",
    summary="GPT-1, GPT-2 and the dense layout of GPT-3.",
    recipe="treadle show gpt2",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


def gpt2(
    *,
    dim: int = 768,
    layers: int = 12,
    heads: int = 12,
    vocab: int = 50_257,
    context: int = 1024,
) -> Decoder:
    """GPT-2 of any size."""
    mixer = Attention(heads=heads, positions=NoPositions(), qkv_bias=True, out_bias=True)
    ffn = MLP(hidden=4 * dim, activation="gelu_tanh")
    return Decoder(
        vocab=vocab,
        dim=dim,
        context=context,
        blocks=(Block(mixer=mixer, ffn=ffn, norm=LayerNorm()),) * layers,
        norm=LayerNorm(),
        learned_positions=True,
    )


def gpt2_small() -> Decoder:
    """GPT-2 small: 124,439,808 parameters."""
    return gpt2()


def gpt2_medium() -> Decoder:
    """GPT-2 medium: 354,823,168 parameters."""
    return gpt2(dim=1024, layers=24, heads=16)


def gpt3_small() -> Decoder:
    """GPT-3 Small (Brown et al. 2020, table 2.1), all layers dense: 125,226,240 parameters."""
    return gpt2(context=2048)


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json of model type `gpt2` describes."""
    hf = HfConfig(config)
    hf.refuse("scale_attn_by_inverse_layer_idx", False)
    hf.refuse("scale_attn_weights", True)
    hf.refuse("add_cross_attention", False)
    dim = hf.integer("n_embd", 768)
    norm = LayerNorm(eps=hf.number("layer_norm_epsilon", 1e-5))
    heads = hf.integer("n_head", 12)
    mixer = Attention(heads=heads, positions=NoPositions(), qkv_bias=True, out_bias=True)
    ffn = MLP(
        hidden=hf.integer("n_inner", 4 * dim),
        activation=hf.activation("activation_function", "gelu_new"),
    )
    return Decoder(
        vocab=hf.integer("vocab_size"),
        dim=dim,
        context=hf.integer("n_positions", 1024),
        blocks=(Block(mixer=mixer, ffn=ffn, norm=norm),) * hf.integer("n_layer", 12),
        norm=norm,
        head=hf.head(tied=True),
        learned_positions=True,
        std=hf.number("initializer_range", 0.02),
    )


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a GPT-2."""
    attention, mlp, eps = parts(decoder, "gpt2")
    return {
        "vocab_size": decoder.vocab,
        "n_positions": decoder.context,
        "n_embd": decoder.dim,
        "n_layer": len(decoder.blocks),
        "n_head": attention.heads,
        "n_inner": mlp.hidden,
        "activation_function": "gelu_new" if mlp.activation == "gelu_tanh" else mlp.activation,
        "layer_norm_epsilon": eps,
        "initializer_range": decoder.std,
        "tie_word_embeddings": isinstance(decoder.head, TiedHead),
        # treadle trains without dropout; transformers would switch it on.
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `gpt2`."""
    norm = LayerNorm(eps=header.number("attention.layer_norm_epsilon"))
    mixer = Attention(
        heads=header.integer("attention.head_count"),
        positions=NoPositions(),
        qkv_bias=True,
        out_bias=True,
    )
    ffn = MLP(hidden=header.integer("feed_forward_length"), activation="gelu_tanh")
    return Decoder(
        vocab=header.vocab(),
        dim=header.integer("embedding_length"),
        context=header.integer("context_length"),
        blocks=(Block(mixer=mixer, ffn=ffn, norm=norm),) * header.integer("block_count"),
        norm=norm,
        head=LinearHead() if "output.weight" in header.shapes else TiedHead(),
        learned_positions=True,
    )


def to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `gpt2`."""
    attention, mlp, eps = parts(decoder, "gpt2")
    metadata = {
        "block_count": len(decoder.blocks),
        "context_length": decoder.context,
        "embedding_length": decoder.dim,
        "feed_forward_length": mlp.hidden,
        "vocab_size": decoder.vocab,
        "attention.head_count": attention.heads,
        "attention.layer_norm_epsilon": eps,
    }
    return GgufHeader("gpt2", metadata)


def parts(decoder: Decoder, family: str) -> tuple[Attention, MLP, float]:
    """Attention, feed-forward and norm epsilon of the first block."""
    attention, block = uniform_attention(decoder, family), decoder.blocks[0]
    if not isinstance(block.ffn, MLP) or not isinstance(block.norm, LayerNorm):
        raise ConfigError(f"{family} has plain feed-forwards and LayerNorm, not {block!r}")
    return attention, block.ffn, block.norm.eps


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    top = (
        rule("transformer.wte.weight", "embedding.weight"),
        rule("transformer.wpe.weight", "position.weight"),
        rule("transformer.ln_f.weight", "norm.weight"),
        rule("transformer.ln_f.bias", "norm.bias"),
        rule("lm_head.weight", "head.weight"),
    )
    return (*top, *expand(conv1d_rules(decoder), len(decoder.blocks)))


def conv1d_rules(decoder: Decoder) -> tuple[Rule, ...]:
    """Rules of one block, shared with GPT-1."""
    fused = Fused((decoder.dim,) * 3)
    ours = "blocks.{i}"
    return (
        rule(
            "transformer.h.{i}.attn.c_attn.weight",
            [f"{ours}.mixer.{n}.weight" for n in "qkv"],
            Chain((Transposed(), fused)),
        ),
        rule(
            "transformer.h.{i}.attn.c_attn.bias", [f"{ours}.mixer.{n}.bias" for n in "qkv"], fused
        ),
        *(
            r
            for theirs, name in (
                ("attn.c_proj", "mixer.o"),
                ("mlp.c_fc", "ffn.up"),
                ("mlp.c_proj", "ffn.down"),
            )
            for r in (
                rule(f"transformer.h.{{i}}.{theirs}.weight", f"{ours}.{name}.weight", Transposed()),
                rule(f"transformer.h.{{i}}.{theirs}.bias", f"{ours}.{name}.bias"),
            )
        ),
        *(
            rule(f"transformer.h.{{i}}.{theirs}.{kind}", f"{ours}.{branch}.{place}.{kind}")
            for theirs, branch in (("ln_1", "mixer_norms"), ("ln_2", "ffn_norms"))
            for place in ("before", "outer")
            for kind in ("weight", "bias")
        ),
    )


def gguf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    fused = Fused((decoder.dim,) * 3)
    rules = [
        rule("token_embd.weight", "embedding.weight"),
        rule("position_embd.weight", "position.weight"),
        rule("output.weight", "head.weight"),
    ]
    for kind in ("weight", "bias"):
        qkv = [f"blocks.{{i}}.mixer.{n}.{kind}" for n in "qkv"]
        rules += [
            rule(f"output_norm.{kind}", f"norm.{kind}"),
            rule(f"blk.{{i}}.attn_qkv.{kind}", qkv, fused),
            rule(f"blk.{{i}}.attn_output.{kind}", f"blocks.{{i}}.mixer.o.{kind}"),
            rule(f"blk.{{i}}.ffn_up.{kind}", f"blocks.{{i}}.ffn.up.{kind}"),
            rule(f"blk.{{i}}.ffn_down.{kind}", f"blocks.{{i}}.ffn.down.{kind}"),
            rule(f"blk.{{i}}.attn_norm.{kind}", f"blocks.{{i}}.mixer_norms.before.{kind}"),
            rule(f"blk.{{i}}.ffn_norm.{kind}", f"blocks.{{i}}.ffn_norms.before.{kind}"),
        ]
    return expand(rules, len(decoder.blocks))


FAMILY = Family(
    name="gpt2",
    huggingface=HuggingFace(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
        prefix="transformer.",
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
    gguf=Gguf(architecture="gpt2", read=from_gguf, write=to_gguf, rules=gguf_rules),
)
