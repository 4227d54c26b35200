"""Root-mean-square normalisation that remembers only its input and one number a row.

    y = x r g,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (g dy - x r^2 mean(g dy x)),     dg = sum_rows dy x r

Written with torch's operators alone, autograd would keep x, x^2, x r and more, in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm_reference(
    x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "... D"]:
    """The definition; statistics in fp32 at least, since squares of bf16 lose too much."""
    x_ = x.to(wide(x))
    y = x_ * torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    return (y * gain).to(x.dtype)


def wide(x: Tensor) -> torch.dtype:
    """fp32, or the dtype of `x` if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(
    x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "... D"]:
    """`rms_norm_reference` with a backward of its own."""
    y: Tensor = _RMSNorm.apply(x, gain, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        x_ = x.to(wide(x))
        r = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_()
        r = r.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        y: Tensor = (x_ * r).mul_(gain).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, r = ctx.saved_tensors
        dy = grads[0].to(wide(x))
        normed = x.to(wide(x)) * r
        dgain = None
        if ctx.needs_input_grad[1]:
            dgain = (dy * normed).flatten(0, -2).sum(0).to(gain.dtype)
        g = dy * gain
        shared = (g * normed).mean(-1, keepdim=True)
        dx = g.sub_(normed.mul_(shared)).mul_(r).to(x.dtype)
        return dx, dgain, None
