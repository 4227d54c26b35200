"""Merges beside PEFT's functions and beside loops in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft_pair import logits, perturbed, tiny
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.merging.averages import Average, Slerp
from treadle.merging.method import MergeMethod, Parts, merge_states
from treadle.merging.task_vectors import (
    Largest,
    RandomRescaled,
    SignElected,
    TaskVectors,
    named_methods,
)
from treadle.models.source import ModelSource, Opened
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.lora import LoRA
from treadle.train.merged import Merged

SHAPE = (7, 11)


def parts(count: int = 3) -> Parts:
    torch.manual_seed(0)
    base = torch.randn(SHAPE)
    return Parts("w", base, [base + torch.randn(SHAPE) * 0.3 for _ in range(count)])


def taus(given: Parts) -> list[Tensor]:
    assert given.base is not None
    return [t - given.base for t in given.tensors]


def test_average_matches_loops() -> None:
    given = parts()
    found = Average(weights=(1.0, 2.0, 5.0))(given)
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            values = [float(t[row, column]) for t in given.tensors]
            exact = (values[0] + 2 * values[1] + 5 * values[2]) / 8
            assert float(found[row, column]) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(Average()(given), torch.stack(list(given.tensors)).mean(0))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_matches_loops(t: float) -> None:
    given = parts(2)
    u, v = (x.flatten().double().tolist() for x in given.tensors)
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    phi = math.acos(dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)))
    exact = [
        (math.sin((1 - t) * phi) * a + math.sin(t * phi) * b) / math.sin(phi)
        for a, b in zip(u, v, strict=True)
    ]
    found = Slerp(t=t)(given)
    torch.testing.assert_close(
        found.flatten().double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def test_slerp_keeps_the_length_that_a_mean_loses() -> None:
    u, v = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert float(Slerp()(Parts("w", None, [u, v])).norm()) == pytest.approx(3.0)
    assert float(Average()(Parts("w", None, [u, v])).norm()) == pytest.approx(3 / math.sqrt(2))
    nearly = Parts("w", None, [u, 2 * u])
    torch.testing.assert_close(Slerp(t=0.25)(nearly), 1.25 * u)


def test_task_arithmetic_matches_peft() -> None:
    from peft.utils.merge_utils import task_arithmetic

    given, weights = parts(), (0.5, 1.5, -0.3)
    expected = given.base + task_arithmetic(taus(given), torch.tensor(weights))
    torch.testing.assert_close(TaskVectors(weights=weights)(given), expected)
    half = TaskVectors(weights=weights, scale=0.5)(given)
    torch.testing.assert_close(half, (given.base + expected) / 2)


@pytest.mark.parametrize("density", [0.2, 0.53, 1.0])
def test_ties_matches_peft(density: float) -> None:
    from peft.utils.merge_utils import ties

    given = parts()
    expected = given.base + ties(taus(given), torch.ones(3), density)
    method = TaskVectors(thin=Largest(density=density), combine=SignElected())
    torch.testing.assert_close(method(given), expected)


def test_weights_of_ties_match_loops() -> None:
    """The weighted mean of those with the sign of the weighted sum."""
    given, weights = parts(), (0.2, 1.0, 3.0)
    found = TaskVectors(weights=weights, combine=SignElected())(given) - given.base
    for place in range(math.prod(SHAPE)):
        row, column = divmod(place, SHAPE[1])
        values = [float(t[row, column]) for t in taus(given)]
        total = sum(a * x for a, x in zip(weights, values, strict=True))
        kept = [(a, x) for a, x in zip(weights, values, strict=True) if x * total > 0]
        exact = sum(a * x for a, x in kept) / sum(a for a, _ in kept)
        assert float(found[row, column]) == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_ties_by_hand() -> None:
    """Votes that cancel each other elect the positive; a negative weight turns a vote round."""
    two = torch.tensor([[2.0, -1.0, 0.0, 1.0], [-2.0, -3.0, 0.0, 2.0]])
    assert SignElected()(two, torch.ones(2, 1)).tolist() == [2.0, -2.0, 0.0, 1.5]
    turned = SignElected()(two, torch.tensor([[1.0], [-1.0]]))
    assert turned.tolist() == [2.0, 3.0, 0.0, -2.0]
    assert Largest(density=0.1)(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), "w").tolist() == [
        [0.0, -3.0],
        [0.0, 0.0],
    ]


def test_only_the_sum_is_rounded() -> None:
    torch.manual_seed(0)
    states = [{"w": torch.randn(50).bfloat16()} for _ in range(3)]
    base = {"w": torch.randn(50).bfloat16()}
    found = merge_states(Average(), states)["w"]
    assert torch.equal(found, (sum(s["w"].float() for s in states) / 3).bfloat16())
    added = merge_states(TaskVectors(), states, base)["w"]
    exact = sum(s["w"].float() for s in states) - 2 * base["w"].float()
    assert (added.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert added.dtype == torch.bfloat16


def test_dare_keeps_a_random_share_and_the_mean() -> None:
    tau = torch.randn(200, 300)
    thin = RandomRescaled(density=0.25)(tau, "0/w")
    kept = thin != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(thin[kept], 4 * tau[kept])
    others = [RandomRescaled(density=0.25)(tau, f"{i}/w") for i in range(400)]
    spread = 4 * math.sqrt(3 / 400) * float(tau.abs().max())  # four deviations of the mean
    assert float((torch.stack(others).mean(0) - tau).abs().max()) < 1.5 * spread
    assert not torch.equal(others[0] != 0, others[1] != 0)
    assert torch.equal(thin, RandomRescaled(density=0.25)(tau, "0/w"))


def test_dare_ties_is_ties_of_what_dare_keeps() -> None:
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    given, thin = parts(), RandomRescaled(density=0.5)
    kept = torch.stack([thin(tau, f"{i}/w") for i, tau in enumerate(taus(given))])
    expected = given.base + disjoint_merge(kept, calculate_majority_sign_mask(kept))
    torch.testing.assert_close(TaskVectors(thin=thin, combine=SignElected())(given), expected)


@pytest.mark.parametrize("name", ["linear", "slerp", "ties"])
def test_a_model_with_itself_is_itself(name: str) -> None:
    state = dict(tiny().named_parameters())
    method: MergeMethod = named_methods()[name]
    if isinstance(method, TaskVectors):
        method = method.replace(thin=Largest(density=1.0))
    merged = merge_states(method, [state, state], dict(tiny(seed=1).named_parameters()))
    for tensor_name, tensor in state.items():
        torch.testing.assert_close(merged[tensor_name], tensor, rtol=1e-4, atol=1e-5)


class Seeded(ModelSource):
    """A tiny model, of a seed for its LoRA."""

    lora: int = 0

    def open(self, workspace: Workspace) -> Opened:
        model = tiny()
        if self.lora:
            LoRA(rank=2, targets=("q", "up"))(model)
            torch.manual_seed(self.lora)
            perturbed(model)
        return Opened(model, Path())


def test_adapters_are_folded_and_their_changes_add_up() -> None:
    """Two tuned models, by task arithmetic: both changes in one model."""
    nowhere = Workspace(Path(), Path(), Pipeline(name="none", steps=()))
    source = Merged(models=(Seeded(lora=1), Seeded(lora=2)), base=Seeded(), method=TaskVectors())
    model = source.open(nowhere).model
    assert all(p.requires_grad for p in model.parameters())
    assert model.head.weight is model.embedding.weight
    one, two = (Merged(models=(Seeded(lora=i),)).open(nowhere).model for i in (1, 2))
    torch.testing.assert_close(
        logits(one), logits(Seeded(lora=1).open(nowhere).model), rtol=1e-4, atol=1e-4
    )
    for name, parameter in model.named_parameters():
        expected = one.get_parameter(name) + two.get_parameter(name) - tiny().get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(tiny())).abs().max() > 0.1


def test_mistakes_are_named() -> None:
    one, wide = (dict(tiny(dim=d).named_parameters()) for d in (32, 64))
    with pytest.raises(
        ConfigError,
        match=r"`embedding.weight` is \(32, 32\) in model 1 and "
        r"\(32, 64\) in model 2; take models of one architecture",
    ):
        merge_states(Average(), [one, wide])
    with pytest.raises(ConfigError, match="in the base"):
        merge_states(TaskVectors(), [one], wide)
    less = {n: t for n, t in one.items() if "norm" not in n}
    with pytest.raises(ConfigError, match=r"model 1 has `blocks.*norm.*` and model 2 does not"):
        merge_states(Average(), [one, less])
    with pytest.raises(ConfigError, match=r"2 weights for 1 models"):
        merge_states(Average(weights=(1.0, 1.0)), [one])
    with pytest.raises(ConfigError, match="weights sum to zero"):
        merge_states(Average(weights=(1.0, -1.0)), [one, one])
    with pytest.raises(ConfigError, match="goes between 2 models, not 3"):
        merge_states(Slerp(), [one, one, one])
    with pytest.raises(ConfigError, match="name the model that all were tuned from"):
        merge_states(TaskVectors(), [one, one])
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_states(Average(), [])
    nowhere = Workspace(Path(), Path(), Pipeline(name="none", steps=()))

    class Adapted(ModelSource):
        def open(self, workspace: Workspace) -> Opened:
            return Opened(Bottleneck(width=4)(tiny()), Path())

    with pytest.raises(ConfigError, match="cannot be merged into weights"):
        Merged(models=(Adapted(),)).open(nowhere)
