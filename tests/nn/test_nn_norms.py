"""Norms against torch, and their places in a block against the formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from treadle.nn.block import Block, BlockLayer
from treadle.nn.context import Packed
from treadle.nn.ffn.ffn import MLP
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import (
    DeepNorm,
    LayerNorm,
    NoNorm,
    Norm,
    Placement,
    PostNorm,
    PreNorm,
    RMSNorm,
    SandwichNorm,
)

DIM = 16


def built(norm: Norm) -> nn.Module:
    torch.manual_seed(0)
    layer = norm.build(DIM).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def compare(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert_close(y, expected)
    wave = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((v * wave).sum(), inputs) for v in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm(),
        RMSNorm(eps=1e-2),
        RMSNorm(offset=1.0),
        LayerNorm(),
        LayerNorm(eps=1e-2, bias=False),
    ],
)
def test_norms_match_torch_and_formula(norm: RMSNorm | LayerNorm) -> None:
    layer = built(norm)
    x = (3 * torch.randn(5, DIM, dtype=torch.float64) + 1).requires_grad_()
    weight = layer.weight
    if isinstance(norm, RMSNorm):
        expected = F.rms_norm(x, (DIM,), weight + norm.offset, norm.eps)
        rms = torch.sqrt((x**2).sum(-1, keepdim=True) / DIM + norm.eps)
        assert_close(expected, x / rms * (weight + norm.offset))
    else:
        expected = F.layer_norm(x, (DIM,), weight, layer.bias, norm.eps)
    compare(layer(x), expected, [x, *layer.parameters()])


def test_fresh_norms_only_normalise() -> None:
    x = torch.randn(4, DIM)
    for norm in (RMSNorm(), RMSNorm(offset=1.0)):
        assert_close(norm.build(DIM)(x), F.rms_norm(x, (DIM,), eps=1e-5))
    assert torch.equal(NoNorm().build(DIM)(x), x)


@pytest.mark.parametrize("norm", [RMSNorm(), RMSNorm(offset=1.0), LayerNorm()])
def test_statistics_of_half_precision_are_wide(norm: Norm) -> None:
    """Squares of 300 overflow float16; the norm does not."""
    x = torch.full((2, DIM), 300.0, dtype=torch.float16)
    x[:, ::2] *= -1
    y = norm.build(DIM).half()(x)
    assert y.dtype == torch.float16
    assert_close(y.float().abs(), torch.ones(2, DIM), rtol=1e-2, atol=1e-2)


def block(placement: Placement, layers: int = 3) -> BlockLayer:
    torch.manual_seed(0)
    config = Block(
        mixer=Attention(heads=2), ffn=MLP(hidden=20), norm=LayerNorm(), placement=placement
    )
    layer = config.build(DIM, 0, layers).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def test_placements_match_formulas() -> None:
    """Pre, sandwich, post and DeepNorm, each written out."""
    x = torch.randn(6, DIM, dtype=torch.float64)
    context = Packed.of(Layout((6,)))
    for placement in (PreNorm(), SandwichNorm(), PostNorm(), DeepNorm()):
        layer = block(placement)
        expected = x
        for norms, f in (
            (layer.mixer_norms, lambda h, layer=layer: layer.mixer(h, context)),
            (layer.ffn_norms, layer.ffn),
        ):
            match placement:
                case PreNorm():
                    expected = expected + f(norms.before(expected))
                case SandwichNorm():
                    expected = expected + norms.after(f(norms.before(expected)))
                case PostNorm():
                    expected = norms.outer(expected + f(expected))
                case DeepNorm():
                    alpha = math.pow(2 * 3, 0.25)
                    expected = norms.outer(alpha * expected + f(expected))
        assert_close(layer(x, context), expected)


@pytest.mark.parametrize(
    ("placement", "names"),
    [
        (PreNorm(), {"before"}),
        (SandwichNorm(), {"before", "after"}),
        (PostNorm(), {"outer"}),
        (DeepNorm(), {"outer"}),
    ],
)
def test_a_block_owns_the_norms_of_its_placement(placement: Placement, names: set[str]) -> None:
    owned = {n.split(".")[1] for n, _ in block(placement).named_parameters() if "_norms." in n}
    assert owned == names
