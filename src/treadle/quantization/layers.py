"""Layers that run from packed weights, in the places of nn.Linear and nn.Embedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from treadle.nn.linear import LinearLike, compute_dtype
from treadle.quantization.packed import Kernel, PackedWeight


class QuantizedLinear(LinearLike):
    """y = x W^T + b with a packed W that does not train; gradients flow to x and b."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, kernel: Kernel) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight, self.bias, self.kernel = weight, bias, kernel

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        rows = x.to(compute_dtype(x)).reshape(-1, self.in_features)
        if torch.is_grad_enabled() and rows.requires_grad:
            y: Tensor = _Product.apply(rows, self.weight, self.kernel)
        else:
            y = self.kernel.forward(rows, self.weight)
        if self.bias is not None:
            y = y.add_(self.bias.to(y.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def effective_weight(self) -> Float[Tensor, "out in"]:
        return self.weight.dense(self.weight.dtype)

    def effective_bias(self) -> Float[Tensor, " out"] | None:
        return self.bias


class QuantizedEmbedding(nn.Module):
    """A table of embeddings that unpacks the rows it is asked for."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        rows = self.weight.rows(ids.flatten(), self.weight.dtype)
        return rows.view(*ids.shape, self.weight.in_features)


class _Product(torch.autograd.Function):
    """Keeps nothing but the packed weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, kernel: Kernel) -> Tensor:
        ctx.weight, ctx.kernel = weight, kernel
        return kernel.forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernel.backward(grads[0], ctx.weight), None, None
