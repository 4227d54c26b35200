"""Which decoders the native path runs: the layout of Llama, and nothing beside it."""

from __future__ import annotations

import torch

from treadle.core.errors import TreadleError
from treadle.kernels.native.build import Shape
from treadle.kernels.native.matrix import GROUP
from treadle.models.decoder import Decoder, LinearHead, TiedHead
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import NoNorm, PreNorm, RMSNorm
from treadle.nn.rope import Frequencies, RoPE

HEAD_STEP = 16


def native_shape(decoder: Decoder, page: int, frequencies: Frequencies) -> Shape:
    """The sizes of a decoder.

    Raises:
        TreadleError: names the part that the native path does not run.
    """
    attention, ffn, norm = _parts(decoder)
    head_dim = attention.head_dim or decoder.dim // attention.heads
    if decoder.embedding_scale != 1.0 or decoder.softcap is not None or decoder.learned_positions:
        raise _refusal("a scale of the embeddings, a soft cap or learned positions")
    if decoder.token_types or not isinstance(decoder.embedding_norm, NoNorm):
        raise _refusal("token types or a norm of the embeddings")
    if not isinstance(decoder.head, TiedHead) and decoder.head != LinearHead():
        raise _refusal(f"the head {decoder.head!r}")
    for name, size, step in (
        ("dim", decoder.dim, GROUP),
        ("hidden", ffn.hidden, GROUP),
        ("heads * head_dim", attention.heads * head_dim, GROUP),
        ("head_dim", head_dim, HEAD_STEP),
    ):
        if size % step:
            raise _refusal(f"{name}={size}, which is no multiple of {step}")
    return Shape(
        dim=decoder.dim,
        heads=attention.heads,
        kv_heads=attention.kv_heads or attention.heads,
        head_dim=head_dim,
        hidden=ffn.hidden,
        layers=len(decoder.blocks),
        vocab=decoder.vocab,
        context=decoder.context,
        page=page,
        turned=len(frequencies.inverse),
        eps=norm.eps,
        scale=attention.scale if attention.scale is not None else head_dim**-0.5,
        turn_factor=frequencies.attention,
    )


def frequencies_of(decoder: Decoder) -> Frequencies:
    """The rotation's frequencies, which must not change with the length of a text."""
    attention, _, _ = _parts(decoder)
    rope = attention.positions
    assert isinstance(rope, RoPE)
    width = int((attention.head_dim or decoder.dim // attention.heads) * rope.fraction)
    base = 1.0 / rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    short, long = (rope.scaling(base, rope.theta, n) for n in (1, decoder.context))
    if not torch.equal(short.inverse, long.inverse) or short.attention != long.attention:
        raise _refusal(f"{type(rope.scaling).__name__}, whose frequencies depend on the length")
    return Frequencies(short.inverse.contiguous(), short.attention)


def _parts(decoder: Decoder) -> tuple[Attention, GatedMLP, RMSNorm]:
    """What all blocks have in common."""
    if len(set(decoder.blocks)) != 1:
        raise _refusal("blocks that differ from each other, or none")
    block = decoder.blocks[0]
    attention, ffn, norm = block.mixer, block.ffn, block.norm
    if not isinstance(block.placement, PreNorm):
        raise _refusal(f"the placement {type(block.placement).__name__} of norms")
    if not isinstance(norm, RMSNorm):
        raise _refusal(f"the norm {type(norm).__name__}")
    if not isinstance(decoder.norm, RMSNorm) or decoder.norm.eps != norm.eps:
        raise _refusal(f"the last norm {decoder.norm!r} beside {norm!r}")
    if not isinstance(attention, Attention):
        raise _refusal(f"the mixer {type(attention).__name__}")
    if not isinstance(attention.positions, RoPE):
        raise _refusal(f"the positions {type(attention.positions).__name__}")
    for name, plain in (
        ("window", None),
        ("qk_norm", None),
        ("softcap", None),
        ("qkv_bias", False),
        ("out_bias", False),
        ("causal", True),
    ):
        if getattr(attention, name) != plain:
            raise _refusal(f"attention with {name}={getattr(attention, name)}")
    if not isinstance(ffn, GatedMLP):
        raise _refusal(f"the feed-forward {type(ffn).__name__}")
    if ffn.activation != "silu" or ffn.bias:
        raise _refusal(f"a gated feed-forward with activation={ffn.activation}, bias={ffn.bias}")
    return attention, ffn, norm


def _refusal(part: str) -> TreadleError:
    return TreadleError(
        f"the native path runs models of Llama's layout, and has no {part}; use the torch path"
    )
