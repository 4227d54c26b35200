"""Attention of queries on keys whose positions are known: the one formula behind every cache.

    out_i = sum_j softmax_j( cap(scale * q_i . k_j) + bias(p_i - p_j) ) v_j
    over the keys j with 0 <= p_j, p_j <= p_i (causal) and (p_i - p_j < window or p_j < sinks)

The mask is a function of positions alone, so packed training, a contiguous cache, a rolling
cache and a token tree all use this one function. `attention_reference` is the definition;
`attention` hands the work to torch's fused kernel wherever that kernel can express the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.kernels.short_attention import is_short, short_attention


@dataclass(frozen=True)
class AttentionRule:
    """What one attention layer asks for, besides its queries, keys and values."""

    scale: float
    causal: bool = True
    window: int | None = None
    """Sliding window: how many positions back a token sees, itself included."""
    sinks: int = 0
    """First positions that a token sees though they lie before its window (Xiao et al. 2023)."""
    softcap: float | None = None
    """cap(s) = softcap * tanh(s / softcap), Gemma 2."""
    slopes: tuple[float, ...] | None = None
    """ALiBi: bias(distance) = -slope_h * distance, one slope a head."""


def visible(
    q_positions: Int[Tensor, "B Q"], k_positions: Int[Tensor, "B K"], rule: AttentionRule
) -> Bool[Tensor, "B Q K"]:
    """Which keys each query may see; a key at position -1 is empty."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (k_positions >= 0)[:, None, :].expand_as(distance)
    if rule.causal:
        seen = seen & (distance >= 0)
    if rule.window is not None:
        near = distance.abs() < rule.window
        seen = seen & (near | (k_positions < rule.sinks)[:, None, :])
    return seen


def attention_mask(
    q_positions: Int[Tensor, "B Q"],
    k_positions: Int[Tensor, "B K"],
    rule: AttentionRule,
    dtype: torch.dtype,
) -> Tensor:
    """The mask in the form of torch's SDPA: bool `[B 1 Q K]`, or with ALiBi additive `[B H Q K]`.

    A query with nothing to see (padding) sees key 0: its output is never read, and must not be NaN.
    """
    seen = visible(q_positions, k_positions, rule).clone()
    seen[..., 0] |= ~seen.any(-1)
    if rule.slopes is None:
        return seen[:, None]
    distance = (q_positions[:, :, None] - k_positions[:, None, :]).to(dtype)
    slopes = torch.tensor(rule.slopes, dtype=dtype, device=distance.device)
    bias = -slopes[None, :, None, None] * distance.abs()[:, None]
    return bias.masked_fill(~seen[:, None], float("-inf"))


def attention_weights(
    q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], mask: Tensor, rule: AttentionRule
) -> Float[Tensor, "B H Q K"]:
    """How much each query attends to each key, in float32 at least."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(-1)


def attention_reference(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    mask: Tensor,
    rule: AttentionRule,
) -> Float[Tensor, "B H Q E"]:
    """The definition, with all scores in memory; used where no fused kernel has the rule."""
    weights = attention_weights(q, k, mask, rule)
    return weights.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def attention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    mask: Tensor | None,
    rule: AttentionRule,
) -> Float[Tensor, "B H Q E"]:
    """Attention by the fused kernel. `mask=None` means plain causal (or full) with Q == K."""
    if rule.softcap is not None:
        if mask is None:
            span = torch.arange(q.shape[2], device=q.device)[None]
            mask = attention_mask(span, span, rule, q.dtype)
        return attention_reference(q, k, v, mask, rule)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if is_short(q, k, v):
        causal = mask is None and rule.causal
        return short_attention(q, k, v, mask, causal=causal, scale=rule.scale)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and rule.causal,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
