"""Sparse changes: where they are, their gradients, and that nothing else moves."""

from __future__ import annotations

import pytest
import torch
from peft_pair import logits, perturbed, tiny, trained

from treadle.core.errors import ConfigError, TreadleError
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.files import save_adapter
from treadle.peft.sparse import (
    LargestWeights,
    RandomWeights,
    SmallestWeights,
    SparseDelta,
    SparseLinear,
    with_masks,
)

SPARSE = SparseDelta(density=0.05)


def test_all_else_is_bit_identical() -> None:
    """After steps of an optimiser, merged: exactly the largest 5% of each target moved."""
    torch.manual_seed(0)
    plain, model = tiny(), SPARSE(tiny())
    assert torch.equal(logits(model), logits(plain))
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    for _ in range(2):
        logits(model).square().mean().backward()
        optimizer.step()
    targets = {f"{name}.weight" for name in adapted(model)}
    assert len(targets) == 14
    for name, after in merge(model).named_parameters():
        before = plain.get_parameter(name)
        moved = (after != before).flatten().nonzero().flatten().tolist()
        if name not in targets:
            assert moved == [], name
            continue
        order = before.detach().abs().flatten().sort(descending=True).indices
        assert moved == sorted(order[: int(0.05 * before.numel())].tolist())


def test_gradients_are_those_of_the_weights() -> None:
    """d has the gradient of W at its places, and adds to W there."""
    model = perturbed(SPARSE(tiny()), size=0.5)
    plain = tiny()
    with torch.no_grad():
        for name, layer in adapted(model).items():
            assert isinstance(layer, SparseLinear)
            weight = plain.get_submodule(name).weight
            for place, d in zip(layer.places.tolist(), layer.d.tolist(), strict=True):
                weight.view(-1)[place] += d
    ours, expected = logits(model), logits(plain)
    assert (ours - logits(tiny())).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
    weight = torch.randn(expected.shape)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, layer in adapted(model).items():
        assert isinstance(layer, SparseLinear)
        assert layer.d.grad is not None
        theirs = plain.get_parameter(f"{name}.weight").grad
        assert theirs is not None
        torch.testing.assert_close(
            layer.d.grad, theirs.flatten()[layer.places], rtol=1e-3, atol=1e-3
        )


def test_places_by_hand() -> None:
    weight = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 1.0]])
    assert set(LargestWeights()(weight, 2).tolist()) == {1, 3}
    assert set(SmallestWeights()(weight, 2).tolist()) == {2, 4}
    torch.manual_seed(0)
    drawn = [tuple(sorted(RandomWeights()(weight, 3).tolist())) for _ in range(40)]
    assert all(len(set(places)) == 3 for places in drawn)
    assert len(set(drawn)) > 10


def test_a_small_change_of_a_rounded_weight_is_rounded_once() -> None:
    base = torch.nn.Linear(4, 4, bias=True, dtype=torch.bfloat16)
    layer = SparseLinear(base, SparseDelta(), torch.arange(4))
    torch.nn.init.constant_(layer.d, 0.013)
    weight = base.weight.detach().float()
    expected = weight.clone()
    expected[0] += 0.013
    assert torch.equal(layer.adapted_weight(), expected.bfloat16())
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, expected.bfloat16(), base.bias)
    )


def test_masks_from_elsewhere_are_the_places() -> None:
    model = perturbed(SPARSE(tiny()))
    found = {name: layer for name, layer in adapted(model).items() if "blocks.1" in name}
    for layer in found.values():
        assert isinstance(layer, SparseLinear)
    masks = {name: layer.places for name, layer in found.items()}
    empty = torch.tensor([], dtype=torch.long)
    masked = with_masks(tiny(), {"blocks.0.mixer.q": empty, **masks}, "FisherMasked")
    assert set(trained(masked)) == {f"{name}.d" for name in found}
    with torch.no_grad():
        for name, parameter in trained(masked).items():
            parameter.copy_(model.get_parameter(name))
    for name, layer in adapted(masked).items():
        assert torch.equal(layer.adapted_weight(), found[name].adapted_weight())


def test_mistakes_are_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"density=0.0001 of the \d+ numbers .* is an empty mask"):
        SPARSE.replace(density=1e-4)(tiny())
    with pytest.raises(ConfigError, match="`embedding` is a Embedding; it goes on linear layers"):
        SPARSE.replace(targets=("embedding",))(tiny())
    with pytest.raises(ConfigError, match="target `query` matches no layer"):
        SPARSE.replace(targets=("query",))(tiny())
    with pytest.raises(ConfigError, match="all masks are empty"):
        with_masks(tiny(), {"blocks.0.mixer.q": torch.tensor([], dtype=torch.long)}, "FisherMasked")
    with pytest.raises(TreadleError, match="PEFT has no such sparse changes"):
        save_adapter(SPARSE(tiny()), str(tmp_path))
