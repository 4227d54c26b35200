"""Norm, gate and rotation with backward passes of their own, against float64 definitions."""

from __future__ import annotations

import pytest
import torch

from treadle.kernels.gated import activate, gated, gated_reference
from treadle.kernels.rms_norm import rms_norm, rms_norm_reference
from treadle.kernels.rotary import rotary, rotary_reference

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "relu2"]


@pytest.mark.parametrize("shape", [(7, 16), (3, 4, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    gain = torch.randn(16, requires_grad=True)
    dy = torch.randn(shape)
    expected = torch.nn.functional.rms_norm(x.double(), (16,), gain.double(), 1e-5)
    torch.testing.assert_close(rms_norm_reference(x, gain, 1e-5), expected.float())
    grads = torch.autograd.grad((expected * dy).sum(), (x, gain))
    found = rms_norm(x, gain, 1e-5)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(torch.autograd.grad((found * dy).sum(), (x, gain)), grads)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name) -> None:
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 9, 16).unbind(0)
    gate.requires_grad_()
    up.requires_grad_()
    expected = gated_reference(gate.double(), up.double(), name)
    grads = torch.autograd.grad((expected * dy).sum(), (gate, up))
    found = gated(gate, up, name)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(torch.autograd.grad((found * dy).sum(), (gate, up)), grads)


@pytest.mark.parametrize("width", [8, 6])
def test_rotary_is_multiplication_by_a_complex_number(width: int) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 3, 16).unbind(0)
    x.requires_grad_()
    angles = torch.randn(5, 1, width)
    x_ = x.double()
    turned = torch.complex(x_[..., :width], x_[..., width : 2 * width])
    turned = turned * torch.polar(torch.ones(5, 1, width).double(), angles.double())
    expected = torch.cat([turned.real, turned.imag, x_[..., 2 * width :]], -1)
    (grad,) = torch.autograd.grad((expected * dy).sum(), x)
    for function in (rotary, rotary_reference):
        found = function(x, angles.cos(), angles.sin())
        torch.testing.assert_close(found, expected.float())
        torch.testing.assert_close(torch.autograd.grad((found * dy).sum(), x)[0], grad)


def saved_bytes(function, *inputs: torch.Tensor) -> int:
    sizes: list[int] = []
    kept = {t.data_ptr() for t in inputs}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in kept:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(sizes)


def test_nothing_is_remembered_but_the_inputs() -> None:
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.randn(32, requires_grad=True)
    assert saved_bytes(lambda a, g: rms_norm(a, g, 1e-5), x, gain) == 64 * 4  # one number a row
    assert saved_bytes(lambda a, g: rms_norm_reference(a, g, 1e-5), x, gain) > 64 * 32 * 4
    up = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda a, b: gated(a, b, "silu"), x, up) == 0
    heads, angles = x.view(64, 2, 16), torch.randn(64, 1, 8, dtype=torch.bfloat16)
    assert saved_bytes(lambda a, b: rotary(a, b, b), heads, angles) == 0


def test_frozen_gain_and_low_precision() -> None:
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.ones(8, dtype=torch.bfloat16)
    y = rms_norm(x, gain, 1e-6)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, rms_norm_reference(x, gain, 1e-6))


def test_activations_match_torch() -> None:
    x = torch.randn(50)
    for name, module in (
        ("gelu", torch.nn.GELU()),
        ("gelu_tanh", torch.nn.GELU("tanh")),
        ("silu", torch.nn.SiLU()),
        ("relu", torch.nn.ReLU()),
    ):
        torch.testing.assert_close(activate(x, name), module(x))
    torch.testing.assert_close(activate(x, "relu2"), x.clamp(min=0) ** 2)
