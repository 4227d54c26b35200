"""act(gate) * up, remembering only gate and up: what lies between is computed again.

d up = dy act(gate),    d gate = dy up act'(gate)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"]


def activate(x: Tensor, name: Activation) -> Tensor:
    """The activation called `name`."""
    match name:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "relu2":
            return F.relu(x).square()


def activation_gradient(grad: Tensor, x: Tensor, name: Activation) -> Tensor:
    """grad * act'(x)."""
    match name:
        case "relu":
            return grad * (x > 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]
        case "relu2":
            return grad * F.relu(x).mul_(2)


def gated_reference(
    gate: Float[Tensor, "N H"], up: Float[Tensor, "N H"], name: Activation
) -> Float[Tensor, "N H"]:
    """The definition."""
    return activate(gate, name) * up


def gated(
    gate: Float[Tensor, "N H"], up: Float[Tensor, "N H"], name: Activation
) -> Float[Tensor, "N H"]:
    """`gated_reference` with a backward of its own."""
    y: Tensor = _Gated.apply(gate, up, name)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return activate(gate, name).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = activation_gradient(grads[0] * up, gate, ctx.name)
        return dgate, activate(gate, ctx.name).mul_(grads[0]), None
