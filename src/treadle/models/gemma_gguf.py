"""Gemma in GGUF. llama.cpp knows by heart what the metadata leaves out: the scale of the queries,
which layers have a window (every other, five of six), and that norms are stored as 1 + w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.models.family import Gguf, uniform_attention
from treadle.models.hub.gguf_header import GgufHeader, rope_from_gguf
from treadle.models.llama_layout import gguf_rules, metadata_to_gguf
from treadle.models.weights import Rule, Shifted, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import Placement, PreNorm, RMSNorm, SandwichNorm
from treadle.nn.rope import RoPE

GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6
"""One layer in so many sees everything, the last of each group."""
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
"""The 27B models scale queries by (dim / heads)^-0.5; llama.cpp knows them by their depth."""


def gemma_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `gemma`."""
    attention = _attention(header)
    return _decoder(header, (attention,) * header.integer("block_count"), PreNorm())


def gemma2_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `gemma2`."""
    layers = header.integer("block_count")
    attention = _attention(header, large=layers == GEMMA2_27B_LAYERS)
    full = attention.replace(softcap=header.number("attn_logit_softcapping", 50.0))
    sliding = full.replace(window=header.integer("attention.sliding_window", 4096))
    mixers = tuple(full if (i + 1) % GEMMA2_PERIOD == 0 else sliding for i in range(layers))
    softcap = header.number("final_logit_softcapping", 30.0)
    return _decoder(header, mixers, SandwichNorm()).replace(softcap=softcap)


def gemma3_from_gguf(header: GgufHeader) -> Decoder:
    """The decoder of a GGUF file of architecture `gemma3`."""
    layers = header.integer("block_count")
    attention = _attention(header, large=layers == GEMMA3_27B_LAYERS)
    full = attention.replace(qk_norm=_norm(header))
    window = header.maybe_integer("attention.sliding_window")
    local = RoPE(theta=header.number("rope.freq_base_swa", 10_000.0))
    sliding = full if window is None else full.replace(window=window, positions=local)
    period = header.integer("attention.sliding_window_pattern", GEMMA3_PERIOD)
    mixers = tuple(full if (i + 1) % period == 0 else sliding for i in range(layers))
    softcap = header.maybe_number("final_logit_softcapping")
    return _decoder(header, mixers, SandwichNorm()).replace(softcap=softcap)


def gemma_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `gemma`."""
    metadata, divisors = metadata_to_gguf(decoder, "gemma")
    return GgufHeader("gemma", metadata, rope_divisors=divisors)


def gemma2_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `gemma2`."""
    metadata, divisors = metadata_to_gguf(decoder, "gemma2")
    first = uniform_attention(decoder, "gemma2")
    metadata |= {
        "attention.sliding_window": first.window or decoder.context,
        "attn_logit_softcapping": first.softcap or 0.0,
        "final_logit_softcapping": decoder.softcap or 0.0,
    }
    return GgufHeader("gemma2", metadata, rope_divisors=divisors)


def gemma3_to_gguf(decoder: Decoder) -> GgufHeader:
    """Header of architecture `gemma3`."""
    mixers = [b.mixer for b in decoder.blocks if isinstance(b.mixer, Attention)]
    full = [i for i, m in enumerate(mixers) if m.window is None]
    sliding = [m for m in mixers if m.window is not None]
    typical = mixers[full[0]] if full else mixers[0]
    described = decoder.replace(blocks=tuple(b.replace(mixer=typical) for b in decoder.blocks))
    metadata, divisors = metadata_to_gguf(described, "gemma3")
    if sliding and isinstance(sliding[0].positions, RoPE):
        metadata |= {
            "attention.sliding_window": sliding[0].window,
            "attention.sliding_window_pattern": full[0] + 1 if full else len(mixers) + 1,
            "rope.freq_base_swa": sliding[0].positions.theta,
        }
    if decoder.softcap is not None:
        metadata["final_logit_softcapping"] = decoder.softcap
    return GgufHeader("gemma3", metadata, rope_divisors=divisors)


def _attention(header: GgufHeader, *, large: bool = False) -> Attention:
    heads, dim = header.integer("attention.head_count"), header.integer("embedding_length")
    head_dim = header.integer("attention.key_length", 256)
    return Attention(
        heads=heads,
        kv_heads=header.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        positions=rope_from_gguf(header, head_dim),
        scale=(dim / heads) ** -0.5 if large else None,
    )


def _norm(header: GgufHeader) -> RMSNorm:
    return RMSNorm(eps=header.number("attention.layer_norm_rms_epsilon"), offset=1.0)


def _decoder(header: GgufHeader, mixers: Sequence[Attention], placement: Placement) -> Decoder:
    dim, norm = header.integer("embedding_length"), _norm(header)
    ffn = GatedMLP(hidden=header.integer("feed_forward_length"), activation="gelu_tanh")
    return Decoder(
        vocab=header.vocab(),
        dim=dim,
        context=header.integer("context_length"),
        blocks=tuple(Block(mixer=m, ffn=ffn, norm=norm, placement=placement) for m in mixers),
        norm=norm,
        head=LinearHead() if "output.weight" in header.shapes else TiedHead(),
        embedding_scale=math.sqrt(dim),
    )


SANDWICH_RULES = (
    rule("blk.{i}.post_attention_norm.weight", "blocks.{i}.mixer_norms.after.weight"),
    rule("blk.{i}.post_ffw_norm.weight", "blocks.{i}.ffn_norms.after.weight"),
)


def rules(decoder: Decoder) -> tuple[Rule, ...]:
    """Llama's names, without its reordered rows; norms shifted by one."""
    named = (*gguf_rules(decoder), *expand(SANDWICH_RULES, len(decoder.blocks)))
    return tuple(
        replace(r, map=Shifted(1.0)) if r.theirs[0].endswith("norm.weight") else r for r in named
    )


GEMMA_GGUF = Gguf(architecture="gemma", read=gemma_from_gguf, write=gemma_to_gguf, rules=rules)
GEMMA2_GGUF = Gguf(architecture="gemma2", read=gemma2_from_gguf, write=gemma2_to_gguf, rules=rules)
GEMMA3_GGUF = Gguf(architecture="gemma3", read=gemma3_from_gguf, write=gemma3_to_gguf, rules=rules)
