"""Softmax attention of one document as a loop over tokens, heads and keys, in float64.

Written from the formulas of the papers; imports nothing from treadle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def attention_loop(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    theta: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """`x` is `[T dim]`; `weights` has q, k, v, o, and q_norm, k_norm where `norm_eps` is given."""
    rows = []
    for i in range(len(x)):
        outputs = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            q = _vector(x[i], weights["q"], h, heads, weights.get("q_norm"), norm_eps, theta, i)
            scores, values = [], []
            for j in range(len(x)):
                if causal and j > i:
                    continue
                if window is not None and abs(i - j) >= window:
                    continue
                k = _vector(
                    x[j], weights["k"], g, kv_heads, weights.get("k_norm"), norm_eps, theta, j
                )
                score = scale * (q * k).sum()
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                if slopes is not None:
                    score = score - slopes[h] * abs(i - j)
                scores.append(score)
                values.append(_vector(x[j], weights["v"], g, kv_heads, None, None, None, j))
            exponentials = torch.exp(torch.stack(scores) - max(s.item() for s in scores))
            probabilities = exponentials / exponentials.sum()
            outputs.append(sum(p * v for p, v in zip(probabilities, values, strict=True)))
        rows.append(weights["o"] @ torch.cat(outputs))
    return torch.stack(rows)


def _vector(
    x: Tensor,
    weight: Tensor,
    head: int,
    heads: int,
    norm: Tensor | None,
    eps: float | None,
    theta: float | None,
    position: int,
) -> Tensor:
    width = len(weight) // heads
    y = weight[head * width : (head + 1) * width] @ x
    if norm is not None and eps is not None:
        y = y / torch.sqrt((y * y).mean() + eps) * norm
    if theta is None:
        return y
    half, turned = width // 2, []
    for i in range(half):
        angle = position * theta ** (-2 * i / width)
        turned.append(y[i] * math.cos(angle) - y[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * theta ** (-2 * i / width)
        turned.append(y[i + half] * math.cos(angle) + y[i] * math.sin(angle))
    return torch.stack(turned)
