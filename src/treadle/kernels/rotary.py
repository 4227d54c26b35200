"""Rotary embedding in one pass over each half, remembering nothing of its input.

    (left, right) -> (left cos - right sin, right cos + left sin)

A rotation's gradient is the rotation back, by -sin.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_reference(
    x: Float[Tensor, "N H D"], cos: Float[Tensor, "N 1 R"], sin: Float[Tensor, "N 1 R"]
) -> Float[Tensor, "N H D"]:
    """The definition: dimensions i and i + R of each head turn together; what is left stays."""
    width = cos.shape[-1]
    left, right, rest = x.split([width, width, x.shape[-1] - 2 * width], -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)


def rotary(
    x: Float[Tensor, "N H D"], cos: Float[Tensor, "N 1 R"], sin: Float[Tensor, "N 1 R"]
) -> Float[Tensor, "N H D"]:
    """`rotary_reference` with a backward of its own; `cos` and `sin` get no gradient."""
    if torch.compiler.is_compiling():  # which refuses to write into views, and fuses the halves
        return rotary_reference(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    width = cos.shape[-1]
    left, right = x[..., :width], x[..., width : 2 * width]
    y = torch.empty_like(x)
    torch.mul(left, cos, out=y[..., :width]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=y[..., width : 2 * width]).addcmul_(left, sin, value=sign)
    y[..., 2 * width :] = x[..., 2 * width :]
    return y
