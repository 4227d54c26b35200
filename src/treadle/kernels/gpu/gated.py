# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""`gated_reference` in Triton: act(gate) * up, and both gradients in one pass.

d up = dy act(gate),    d gate = dy up act'(gate)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from treadle.kernels.gated import Activation
from treadle.kernels.gpu.device import check

BLOCK = 1024
CODES: dict[Activation, int] = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu2": 4}


def gated(
    gate: Float[Tensor, "N H"], up: Float[Tensor, "N H"], name: Activation
) -> Float[Tensor, "N H"]:
    """As `treadle.kernels.gated.gated`."""
    check(gate.device, "TritonKernels")
    y: Tensor = _Gated.apply(gate, up, name)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: Activation) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        if size := gate.numel():
            _forward[(triton.cdiv(size, BLOCK),)](gate, up, y, size, ACT=CODES[name], BLOCK=BLOCK)
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy, dgate, dup = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        if size := gate.numel():
            _backward[(triton.cdiv(size, BLOCK),)](
                gate, up, dy, dgate, dup, size, ACT=CODES[ctx.name], BLOCK=BLOCK
            )
        return dgate, dup, None


@triton.jit
def _bent(x):
    """tanh(sqrt(2 / pi) (x + 0.044715 x^3)) from exp: at the ends 1 - 2 / inf or 1 - 2 / 1."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 1 - 2 / (1 + tl.exp(2 * inner))


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == 0:
        y = tl.maximum(x, 0.0)
    elif ACT == 1:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == 2:
        y = 0.5 * x * (1 + _bent(x))
    elif ACT == 3:
        y = x / (1 + tl.exp(-x))
    else:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y


@triton.jit
def _slope(x, ACT: tl.constexpr):
    if ACT == 0:
        d = tl.where(x > 0, 1.0, 0.0)
    elif ACT == 1:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == 2:
        bent = _bent(x)
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        d = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * inner
    elif ACT == 3:
        sigmoid = 1 / (1 + tl.exp(-x))
        d = sigmoid * (1 + x * (1 - sigmoid))
    else:
        d = 2 * tl.maximum(x, 0.0)
    return d


@triton.jit
def _forward(gate, up, y, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = own < size
    x = tl.load(gate + own, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + own, mask=there, other=0.0).to(tl.float32)
    tl.store(y + own, (_act(x, ACT) * u).to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward(gate, up, dy, dgate, dup, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = own < size
    x = tl.load(gate + own, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + own, mask=there, other=0.0).to(tl.float32)
    g = tl.load(dy + own, mask=there, other=0.0).to(tl.float32)
    tl.store(dgate + own, (g * u * _slope(x, ACT)).to(dgate.dtype.element_ty), mask=there)
    tl.store(dup + own, (g * _act(x, ACT)).to(dup.dtype.element_ty), mask=there)
