# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""`rms_norm_reference` in Triton: one pass forward, one pass backward.

    y = x r g,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (g dy - x r^2 mean(g dy x)),     dg = sum_rows dy x r

A program holds a row at a time in registers. In the backward pass each of PROGRAMS takes every so
manyeth row and sums its own part of dg, so that no two write to one place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from treadle.kernels.gpu.device import check

PROGRAMS = 256


def rms_norm(
    x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "... D"]:
    """As `treadle.kernels.rms_norm.rms_norm`."""
    check(x.device, "TritonKernels")
    y: Tensor = _RMSNorm.apply(x, gain, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        y = torch.empty_like(rows)
        r = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        width = rows.shape[1]
        if len(rows):
            _forward[(len(rows),)](
                rows, gain, y, r, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width)
            )
        ctx.save_for_backward(rows, gain, r)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gain, r = ctx.saved_tensors
        dy = grads[0].contiguous().view(rows.shape)
        dx, width = torch.empty_like(rows), rows.shape[1]
        programs = min(PROGRAMS, len(rows))
        parts = torch.zeros(programs, width, dtype=torch.float32, device=rows.device)
        if programs:
            _backward[(programs,)](
                *(rows, gain, r, dy, dx, parts, len(rows), programs),
                WIDTH=width,
                BLOCK=triton.next_power_of_2(width),
            )
        dgain = parts.sum(0).to(gain.dtype) if ctx.needs_input_grad[1] else None
        return dx.view(grads[0].shape), dgain, None


@triton.jit
def _forward(x, gain, y, r, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    there = columns < WIDTH
    own = row * WIDTH + columns
    value = tl.load(x + own, mask=there, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scale = tl.load(gain + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(y + own, (value * inverse * scale).to(y.dtype.element_ty), mask=there)
    tl.store(r + row, inverse)


@triton.jit
def _backward(x, gain, r, dy, dx, parts, rows, programs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    program, columns = tl.program_id(0), tl.arange(0, BLOCK)
    there = columns < WIDTH
    scale = tl.load(gain + columns, mask=there, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        own = row * WIDTH + columns
        value = tl.load(x + own, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(dy + own, mask=there, other=0.0).to(tl.float32)
        inverse = tl.load(r + row)
        normed = value * inverse
        part += grad * normed
        g = grad * scale
        shared = tl.sum(g * normed, 0) / WIDTH
        tl.store(dx + own, ((g - normed * shared) * inverse).to(dx.dtype.element_ty), mask=there)
    tl.store(parts + program * WIDTH + columns, part, mask=there)
