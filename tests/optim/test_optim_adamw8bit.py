"""8-bit AdamW beside torchao on the same gradients, and beside exact AdamW on a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from train.tiny import TinyStream, tiny_model

from treadle.core.errors import ConfigError
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.adamw8bit import AdamW8bit
from treadle.optim.optimizer import Optimizer
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess

SHAPES = ((64, 128), (32, 200), (50,))


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [(str(i), nn.Parameter(torch.randn(shape))) for i, shape in enumerate(SHAPES)]


def test_matches_torchao() -> None:
    """Ten steps on the same gradients, of very different sizes, with decay."""
    library = pytest.importorskip("torchao.optim")
    ours, theirs = parameters(), parameters()
    built = AdamW8bit(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1).build(ours)
    groups = [
        {"params": [p for _, p in theirs[:2]], "weight_decay": 0.1},
        {"params": [theirs[2][1]], "weight_decay": 0.0},
    ]
    expected = library.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    with torch.compiler.set_stance("force_eager"):
        for step in range(10):
            torch.manual_seed(step)
            for (_, a), (_, b) in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape).pow(3) * 10.0 ** (step % 3 - 2)
                b.grad = a.grad.clone()
            built.step()
            expected.step()
            for (name, a), (_, b) in zip(ours, theirs, strict=True):
                wrong = (a - b).abs() > 1e-5  # a number at the border between two codes
                assert wrong.float().mean() < 2e-2, f"{name} at step {step}"
    for place in (0, 1):
        state = expected.state[theirs[place][1]]
        for ours_name, theirs_name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            codes = built.state[ours[place][1]][ours_name]
            assert (codes != state[theirs_name].codes).float().mean() < 2e-2


def test_states_take_two_bytes_a_parameter() -> None:
    ours = parameters()[:2]
    built = AdamW8bit(lr=1e-2).build(ours)
    for _, p in ours:
        p.grad = torch.randn_like(p)
    built.step()
    kept = sum(t.nbytes for s in built.state.values() for t in s.values() if torch.is_tensor(t))
    assert kept / sum(p.numel() for _, p in ours) == pytest.approx(2 + 2 * 4 / 256, rel=1e-2)


def losses(optimizer: Optimizer, folder: Path, steps: Sequence[int]) -> list[float]:
    found = []
    for until in steps:  # each call goes on from the last checkpoint
        plan = SingleProcess()
        result = fit(
            tiny_model(dim=64),
            TinyStream(),
            CausalLM(),
            optimizer=optimizer,
            schedule=Constant(),
            config=Fit(steps=until, checkpoint_every=100),
            plan=plan,
            world=plan.setup(),
            folder=folder,
        )
        found.append(result.loss)
    return found


def test_learns_like_exact_adamw_and_resumes_exactly(tmp_path: Path) -> None:
    (exact,) = losses(AdamW(lr=3e-3), tmp_path / "exact", [40])
    (ours,) = losses(AdamW8bit(lr=3e-3), tmp_path / "ours", [40])
    (start,) = losses(AdamW(lr=0.0), tmp_path / "start", [40])
    assert ours == pytest.approx(exact, abs=0.05 * (start - exact))
    assert losses(AdamW8bit(lr=3e-3), tmp_path / "again", [15, 40])[-1] == ours


def test_nothing_to_train_is_named() -> None:
    with pytest.raises(ConfigError, match="AdamW8bit: nothing trains"):
        AdamW8bit(lr=1.0).build([])
