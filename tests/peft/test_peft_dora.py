"""DoRA beside PEFT: outputs, gradients, folders both ways; and the norm that is never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_pair import check_against_peft, logits, perturbed, tiny, trained
from torch import nn

from treadle.core.errors import ConfigError
from treadle.nn.linear import weight_of
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.dora import DoRA, DoRALinear
from treadle.peft.low_rank import RankStabilised
from treadle.quantization.int8 import Int8


@pytest.mark.parametrize("targets", [("q", "v", "down"), ("blocks.1.ffn.up",)])
def test_matches_peft(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = perturbed(DoRA(rank=4, alpha=12, targets=targets, scaling=RankStabilised())(tiny()))
    assert check_against_peft(model, tmp_path) == 3 * len(adapted(model))


def test_start_equals_base_and_merged_equals_adapted() -> None:
    model = DoRA(rank=4)(tiny())
    base = logits(tiny())
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    assert {n.rpartition(".")[2] for n in trained(model)} == {"A", "B", "m"}
    perturbed(model)
    with_adapter = logits(model)
    assert (with_adapter - base).abs().max() > 0.1
    with disabled(model):
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(merge(model)), with_adapter, rtol=1e-4, atol=1e-4)


def test_norm_is_that_of_the_whole_matrix() -> None:
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(7, 5), DoRA(rank=2, alpha=3.0))
    nn.init.normal_(layer.B)
    whole = layer.base.weight.double() + 1.5 * layer.B.double() @ layer.A.double()
    torch.testing.assert_close(layer.norm().double(), whole.norm(dim=1), rtol=1e-5, atol=1e-6)
    assert not layer.norm().requires_grad


def test_a_bias_stays_outside_the_scaling() -> None:
    layer = DoRALinear(nn.Linear(7, 5), DoRA(rank=2))
    with torch.no_grad():
        layer.m.mul_(3)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), 3 * x @ layer.base.weight.T + layer.base.bias)
    torch.testing.assert_close(layer.merged()(x), layer(x))


def test_on_a_quantised_base() -> None:
    model = perturbed(DoRA(rank=2, targets=("q", "up"))(Int8()(tiny())))
    layer = next(iter(adapted(model).values()))
    assert isinstance(layer, DoRALinear)
    torch.testing.assert_close(
        layer.adapted_weight().norm(dim=1), layer.m.detach().abs(), rtol=1e-4, atol=1e-4
    )
    out = logits(model)
    out.sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
    assert weight_of(layer).shape == (32, 32)
    torch.testing.assert_close(logits(merge(model)), out, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"DoRA: rank 20 is larger than `blocks.0.mixer.k`"):
        DoRA(rank=20)(tiny())
    with pytest.raises(ConfigError, match=r"DoRA: target `query` matches no layer"):
        DoRA(targets=("query",))(tiny())
    with pytest.raises(ConfigError, match=r"`embedding` is a Embedding; it goes on linear"):
        DoRA(rank=2, targets=("embedding",))(tiny())
