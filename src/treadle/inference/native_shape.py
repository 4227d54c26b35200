"""Which decoders the native path runs: Llama, Mistral, Qwen, Gemma, and what is built like them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from treadle.core.errors import TreadleError
from treadle.kernels.native.build import Rope, Shape
from treadle.kernels.native.matrix import GROUP
from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import PreNorm, RMSNorm, SandwichNorm
from treadle.nn.rope import Frequencies, RoPE

HEAD_STEP = 16
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""In the order of `Activation` of activation.h."""


@dataclass(frozen=True)
class NativePlan:
    """What the native code is told of a decoder, beside its weights."""

    shape: Shape
    windows: tuple[int, ...]
    """Of each layer; 0 where it sees everything."""
    rope_of: tuple[int, ...]
    """Of each layer, which of `frequencies`."""
    frequencies: tuple[Frequencies, ...]

    def ropes(self) -> ctypes.Array[Rope]:
        """For the native code; `frequencies` must outlive it."""
        each = (Rope(len(f.inverse), f.attention, f.inverse.data_ptr()) for f in self.frequencies)
        return (Rope * len(self.frequencies))(*each)


def native_plan(decoder: Decoder, page: int) -> NativePlan:
    """What the native code has to know.

    Raises:
        TreadleError: names the part that the native path does not run.
    """
    attentions, ffn, norm = _parts(decoder)
    first = attentions[0]
    head_dim = first.head_dim or decoder.dim // first.heads
    if decoder.learned_positions:
        raise _refusal("learned positions")
    if not isinstance(decoder.head, TiedHead) and decoder.head != LinearHead():
        raise _refusal(f"the head {decoder.head!r}")
    for name, size, step in (
        ("dim", decoder.dim, GROUP),
        ("hidden", ffn.hidden, GROUP),
        ("heads * head_dim", first.heads * head_dim, GROUP),
        ("head_dim", head_dim, HEAD_STEP),
    ):
        if size % step:
            raise _refusal(f"{name}={size}, which is no multiple of {step}")
    ropes = list(dict.fromkeys(a.positions for a in attentions))
    frequencies = tuple(_frequencies(rope, head_dim, decoder.context) for rope in ropes)
    shape = Shape(
        dim=decoder.dim,
        heads=first.heads,
        kv_heads=first.kv_heads or first.heads,
        head_dim=head_dim,
        hidden=ffn.hidden,
        layers=len(decoder.blocks),
        vocab=decoder.vocab,
        context=decoder.context,
        page=page,
        ropes=len(ropes),
        activation=ACTIVATIONS.index(ffn.activation),
        eps=norm.eps,
        scale=first.scale if first.scale is not None else head_dim**-0.5,
        embedding_scale=decoder.embedding_scale,
        score_cap=first.softcap or 0.0,
        logit_cap=decoder.softcap or 0.0,
    )
    return NativePlan(
        shape,
        tuple(a.window or 0 for a in attentions),
        tuple(ropes.index(a.positions) for a in attentions),
        frequencies,
    )


def _frequencies(rope: object, head_dim: int, context: int) -> Frequencies:
    """The rotation's frequencies, which must not change with the length of a text."""
    assert isinstance(rope, RoPE)
    width = int(head_dim * rope.fraction)
    base = 1.0 / rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    short, long = (rope.scaling(base, rope.theta, n) for n in (1, context))
    if not torch.equal(short.inverse, long.inverse) or short.attention != long.attention:
        raise _refusal(f"{type(rope.scaling).__name__}, whose frequencies depend on the length")
    return Frequencies(short.inverse.contiguous(), short.attention)


def _parts(decoder: Decoder) -> tuple[list[Attention], GatedMLP, RMSNorm]:
    """The attention of each layer, and what all blocks have in common."""
    if not decoder.blocks:
        raise _refusal("models without blocks")
    attentions = [_attention(block) for block in decoder.blocks]
    alike = {
        block.replace(mixer=attention.replace(window=None, positions=RoPE()))
        for block, attention in zip(decoder.blocks, attentions, strict=True)
    }
    if len(alike) > 1:
        raise _refusal("blocks that differ in more than window and positions")
    block = alike.pop()
    ffn, norm = block.ffn, block.norm
    if not isinstance(block.placement, PreNorm | SandwichNorm):
        raise _refusal(f"the placement {type(block.placement).__name__} of norms")
    if not isinstance(norm, RMSNorm):
        raise _refusal(f"the norm {type(norm).__name__}")
    for where, other in (("last", decoder.norm), ("queries' and keys'", attentions[0].qk_norm)):
        if other is not None and (not isinstance(other, RMSNorm) or other.eps != norm.eps):
            raise _refusal(f"the {where} norm {other!r} beside {norm!r}")
    if not isinstance(ffn, GatedMLP):
        raise _refusal(f"the feed-forward {type(ffn).__name__}")
    return attentions, ffn, norm


def _attention(block: Block) -> Attention:
    attention = block.mixer
    if not isinstance(attention, Attention):
        raise _refusal(f"the mixer {type(attention).__name__}")
    if not isinstance(attention.positions, RoPE):
        raise _refusal(f"the positions {type(attention.positions).__name__}")
    if not attention.causal:
        raise _refusal("attention that looks ahead")
    return attention


def _refusal(part: str) -> TreadleError:
    return TreadleError(
        "the native path runs models built like Llama, Qwen and Gemma, and has no "
        f"{part}; use the torch path"
    )
