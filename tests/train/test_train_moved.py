"""What moved in training is told, and what should have moved, or should not, is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_pair import perturbed, tiny, trained
from torch import nn
from train.tiny import TinyStream, tiny_model

from treadle.core.errors import TreadleError
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.adalora import AdaLoRA
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.compacter import Kronecker
from treadle.peft.dora import DoRA
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prompt import PromptTuning
from treadle.train.fit import Fit, fit
from treadle.train.moved import changes, prints_of, summary
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

METHODS = [
    LoRA(rank=2),
    DoRA(rank=2),
    AdaLoRA(rank=2),
    IA3(),
    Bottleneck(width=4),
    Bottleneck(width=4, projection=Kronecker(parts=2)),
    PrefixTuning(tokens=3),
    PromptTuning(tokens=3),
]


def train(model: nn.Module, folder: Path, *, steps: int, lr: float = 1e-2) -> None:
    plan = SingleProcess()
    fit(
        model,
        TinyStream(),
        CausalLM(),
        optimizer=AdamW(lr=lr),
        schedule=Constant(),
        config=Fit(steps=steps, precision=FP32()),
        plan=plan,
        world=plan.setup(),
        folder=folder,
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_moves_its_own_tensors_and_no_other(method: Transform, tmp_path: Path) -> None:
    model = method(tiny_model())
    before = prints_of(model)
    train(model, tmp_path, steps=3)
    found = changes(before, model.state_dict(), steps=3)
    assert set(found) == set(trained(model))
    assert all(0 < change < 2 for change in found.values())
    assert list(found.values()) == sorted(found.values())


def test_the_change_is_the_relative_distance() -> None:
    model = LoRA(rank=2)(tiny())
    before = prints_of(model)
    old = {n: p.detach().clone() for n, p in trained(model).items()}
    found = changes(before, perturbed(model).state_dict(), steps=2)
    for name, parameter in trained(model).items():
        exact = (parameter - old[name]).norm() / parameter.norm()
        assert found[name] == pytest.approx(exact.item(), rel=1e-4)
    line = summary(found)
    assert line.startswith("28 tensors by ")
    assert f"least `{next(iter(found))}`" in line


def test_one_number_of_a_large_tensor_is_enough() -> None:
    model = nn.Linear(3000, 50)
    before = prints_of(model)
    with torch.no_grad():
        model.weight[17, 1001] += 1e-6
        model.bias += 1
    assert changes(before, model.state_dict(), steps=9)["weight"] == 0.0


def test_what_is_stuck_or_loose_is_an_error(tmp_path: Path) -> None:
    model = LoRA(rank=2, targets=("q",))(tiny_model())
    before = prints_of(model)
    train(model, tmp_path, steps=2, lr=0.0)
    with pytest.raises(
        TreadleError, match=r"`blocks.0.mixer.q.A`.* 1 more did not move in 2 steps"
    ):
        changes(before, model.state_dict(), steps=2)
    assert set(changes(before, model.state_dict(), steps=1).values()) == {0.0}
    with torch.no_grad():
        model.norm.weight.add_(1e-3)
    with pytest.raises(TreadleError, match=r"`norm.weight` moved in training, though frozen"):
        changes(before, model.state_dict(), steps=1)


def test_low_precision_parameters_have_prints_too() -> None:
    model = nn.Linear(4, 4).bfloat16()
    before = prints_of(model)
    with torch.no_grad():
        model.weight.add_(1.0)
        model.bias.add_(1.0)
    assert set(changes(before, model.state_dict(), steps=2)) == {"weight", "bias"}
