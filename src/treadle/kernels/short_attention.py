"""Attention over short rows in bf16 on a CPU, with the backward pass in fp32.

Torch's fused backward takes products of 32 queries at a time; in bf16 each is packed anew, which
costs more than the product itself while rows are short. In fp32 the same kernel needs half the
time over 64 to 128 keys (heads of 64 numbers) and as much over 256. What forward keeps for it stays
in bf16, and the products of rounded numbers are the same, so the gradients only become more exact.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST = 16 * 1024
"""Numbers in the keys of a head, from which on bf16 is as fast."""


def is_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the backward pass of this attention is faster in fp32."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (q, k, v))
        and q.shape[-1] == v.shape[-1]
        and all(t.stride(-1) == 1 and t.numel() > 0 for t in (q, k, v))  # the kernel takes no other
        and k.shape[2] * k.shape[3] <= MOST
    )


def short_attention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K D"],
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """As `scaled_dot_product_attention`; a mask is bool (True is seen) or is added."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    found: Tensor = _ShortAttention.apply(q, k, v, mask, causal, scale)
    return found


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        ctx.causal, ctx.scale = causal, scale
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, mask = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.float() for t in (gradient, q, k, v, out)),
            logsumexp,
            0.0,
            ctx.causal,
            attn_mask=None if mask is None else mask.float(),
            scale=ctx.scale,
        )
        return *(g.to(q.dtype) for g in found), None, None, None
