"""What the native library takes of a model, in its order: matrices by size, biases and norms."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config
from treadle.inference.native_weights import NativeWeights
from treadle.kernels.native.build import Shape
from treadle.models.decoder import Decoder, TiedHead
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import RMSNorm

LINEARS = ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "ffn.gate", "ffn.up", "ffn.down")
NORMS = (
    *("mixer_norms.before", "mixer_norms.after", "ffn_norms.before", "ffn_norms.after"),
    *("mixer.q_norm", "mixer.k_norm"),
)
STRIP = 32
"""Biases are padded to a multiple of it."""


def matrix_sizes(decoder: Decoder, shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns, in the order of `NativeRunner.matrices`."""
    mixed, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    dim, hidden = shape.dim, shape.hidden
    inner = ((mixed, dim), (kv, dim), (kv, dim), (dim, mixed), (hidden, dim), (hidden, dim))
    sizes = {"embedding.weight": (shape.vocab, dim)}
    for i in range(shape.layers):
        each = zip(LINEARS, (*inner, (dim, hidden)), strict=True)
        sizes |= {f"blocks.{i}.{name}.weight": size for name, size in each}
    if not isinstance(decoder.head, TiedHead):
        sizes["head.weight"] = (shape.vocab, dim)
    return sizes


def vectors_of(weights: NativeWeights) -> list[Float[Tensor, " n"] | None]:
    """The last norm's gains, then of each layer its biases and norms."""
    found = [_gain(weights, "norm", weights.decoder.norm)]
    for i, block in enumerate(weights.decoder.blocks):
        assert isinstance(block.mixer, Attention)
        for name in LINEARS:
            bias = weights.vector(f"blocks.{i}.{name}.bias")
            found.append(None if bias is None else F.pad(bias, (0, -len(bias) % STRIP)))
        for name in NORMS:
            norm = block.mixer.qk_norm if name.startswith("mixer.") else block.norm
            found.append(_gain(weights, f"blocks.{i}.{name}", norm))
    return found


def _gain(weights: NativeWeights, name: str, norm: Config | None) -> Float[Tensor, " n"] | None:
    weight = weights.vector(f"{name}.weight")
    if weight is None:
        return None
    assert isinstance(norm, RMSNorm)
    return (weight + norm.offset).contiguous()
