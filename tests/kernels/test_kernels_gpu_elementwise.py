"""Norm and gate in Triton, run by its interpreter, beside their definitions in float64."""

from __future__ import annotations

import typing

import pytest
import torch

from treadle.core.errors import TreadleError
from treadle.kernels.gated import Activation, gated_reference
from treadle.kernels.rms_norm import rms_norm_reference

pytest.importorskip("triton")
from treadle.kernels.gpu import device, gated, rms_norm

NAMES = typing.get_args(Activation)


@pytest.mark.parametrize("shape", [(1, 8), (5, 3, 20), (300, 6)], ids=str)
def test_rms_norm_and_gradients(shape: tuple[int, ...]) -> None:
    """The last has more rows than programs, so that some take two."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).requires_grad_()
    gain = torch.randn(shape[-1]).requires_grad_()
    dy = torch.randn(shape)
    y = rms_norm.rms_norm(x, gain, 1e-3)
    found = torch.autograd.grad(y, (x, gain), dy)
    x_, gain_ = (t.detach().double().requires_grad_() for t in (x, gain))
    exact = rms_norm_reference(x_, gain_, 1e-3)
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)
    for mine, wanted in zip(
        found, torch.autograd.grad(exact, (x_, gain_), dy.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gated_and_gradients(name: Activation) -> None:
    torch.manual_seed(1)
    gate = (torch.randn(7, 190) * 4).requires_grad_()
    up, dy = torch.randn(7, 190).requires_grad_(), torch.randn(7, 190)
    y = gated.gated(gate, up, name)
    found = torch.autograd.grad(y, (gate, up), dy)
    gate_, up_ = (t.detach().double().requires_grad_() for t in (gate, up))
    exact = gated_reference(gate_, up_, name)
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)
    for mine, wanted in zip(
        found, torch.autograd.grad(exact, (gate_, up_), dy.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), wanted, atol=1e-4, rtol=1e-4)


def test_large_and_few_numbers() -> None:
    """No overflow to NaN at the ends, no row at all, rows that do not lie side by side."""
    x = torch.tensor([[-300.0, 300.0, -90.0, 90.0]])
    for name in NAMES:
        y = gated.gated(x, torch.ones_like(x), name)
        torch.testing.assert_close(y, gated_reference(x, torch.ones_like(x), name))
    assert rms_norm.rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-5).shape == (0, 4)
    assert gated.gated(torch.zeros(0, 4), torch.zeros(0, 4), "silu").shape == (0, 4)
    wide = torch.randn(6, 8)
    found = rms_norm.rms_norm(wide.T, torch.ones(6), 1e-5)
    torch.testing.assert_close(found, rms_norm_reference(wide.T, torch.ones(6), 1e-5))


def test_a_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    with pytest.raises(
        TreadleError, match="TritonKernels run on a GPU, and the tensors are on cpu"
    ):
        rms_norm.rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-5)
    with pytest.raises(TreadleError, match="TritonKernels run on a GPU"):
        gated.gated(torch.zeros(1, 4), torch.zeros(1, 4), "silu")
