"""Softmax attention of H query heads on G key-value heads (Vaswani 2017; Ainslie 2023).

    q, k, v = W_q x, W_k x, W_v x          [N H D], [N G D], [N G D]
    y = W_o concat_h( softmax(q_h K_g(h)^T / sqrt(D)) V_g(h) ),   g(h) = h G // H

G = H is multi-head, 1 < G < H grouped-query, G = 1 multi-query attention.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.kernels.attention import AttentionRule
from treadle.nn.context import Context
from treadle.nn.mixers.mixer import Mixer
from treadle.nn.norms import Norm, RMSNorm
from treadle.nn.positions import Positions
from treadle.nn.rope import RoPE

CARDS = (
    Card(
        id="arch.attention",
        paper="Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, GQA, arXiv:2305.13245",
        summary="Multi-head, grouped-query and multi-query attention.",
        recipe="treadle run quickstart-scratch",
        oracle="tests/nn/test_nn_attention.py::test_attention_matches_float64_loop",
    ),
    Card(
        id="arch.sliding",
        paper="Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825",
        summary="Each token sees only the last `window` positions; a rolling cache suffices.",
        recipe="treadle run quickstart-scratch steps.1.model.decoder.blocks.0.mixer.window=128",
        oracle="tests/nn/test_nn_attention.py::test_sliding_window_matches_mistral",
    ),
)


class AcrossHeads(Config):
    """One norm over all heads."""

    norm: Norm = RMSNorm()


class Attention(Mixer):
    """Softmax attention."""

    heads: int
    kv_heads: int | None = None
    """Key-value heads; None means as many as heads."""
    head_dim: int | None = None
    """Width of a head; None means dim / heads."""
    positions: Positions = RoPE()
    window: int | None = None
    qk_norm: Norm | AcrossHeads | None = None
    """Normalises queries and keys before rotation: those of each head (Qwen 3, Gemma 3), or all
    heads' together (OLMoE)."""
    softcap: float | None = None
    scale: float | None = None
    """Factor on q.k; None means head_dim ** -0.5."""
    qkv_bias: bool = False
    out_bias: bool = False
    causal: bool = True

    def build(self, dim: int, layer: int) -> AttentionLayer:
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ConfigError(f"Attention: kv_heads={kv_heads} must divide heads={self.heads}")
        if self.head_dim is None and dim % self.heads:
            raise ConfigError(
                f"Attention: heads={self.heads} must divide dim={dim}, or give head_dim"
            )
        return AttentionLayer(self, dim, layer)


class AttentionLayer(nn.Module):
    def __init__(self, config: Attention, dim: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or dim // config.heads
        self.rule = AttentionRule(
            scale=config.scale if config.scale is not None else self.head_dim**-0.5,
            causal=config.causal,
            window=config.window,
            softcap=config.softcap,
            slopes=config.positions.slopes(config.heads),
        )
        self.q = nn.Linear(dim, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(dim, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(self.heads * self.head_dim, dim, bias=config.out_bias)
        self.q_norm = _norm(config.qk_norm, self.heads, self.head_dim)
        self.k_norm = _norm(config.qk_norm, self.kv_heads, self.head_dim)

    def forward(self, x: Float[Tensor, "N dim"], context: Context) -> Float[Tensor, "N dim"]:
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.config.positions.rotate(q, k, context)
        return self.o(context.attend(self.layer, q, k, v, self.rule).flatten(-2))  # type: ignore[no-any-return]


def _norm(config: Norm | AcrossHeads | None, heads: int, head_dim: int) -> nn.Module | None:
    if isinstance(config, AcrossHeads):
        return AcrossHeadsNorm(config.norm.build(heads * head_dim))
    return None if config is None else config.build(head_dim)


class AcrossHeadsNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Float[Tensor, "N H D"]) -> Float[Tensor, "N H D"]:
        y: Tensor = self.norm(x.flatten(-2)).view_as(x)
        return y
