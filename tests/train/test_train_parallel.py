"""Two processes equal one: losses, gradients, weights, resume; and memory per rank falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.processes import launch
from train.workers import PLANS, Trainer, clips, resume_all, train_under_plans

from treadle.core.errors import ConfigError, TreadleError
from treadle.train.checkpoint import CheckpointStore
from treadle.train.parallel.ddp import DDP
from treadle.train.parallel.fsdp import FSDP
from treadle.train.parallel.plan import SingleProcess, pick_device

pytestmark = pytest.mark.distributed
STEPS = 4


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same steps in one process."""
    trainer = Trainer(SingleProcess())
    seen = trainer.train(STEPS)
    return {"seen": seen, "weights": dict(trainer.plan.full_state(trainer.model))}


def test_two_ranks_equal_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    names = ("zero3", "zero2", "zero1", "offload", "ddp")
    launch(train_under_plans, 2, tmp_path, tmp_path, names, STEPS)
    held = {}
    for name in names:
        for rank in (0, 1):
            seen, held[name] = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            torch.testing.assert_close(
                torch.tensor(seen), torch.tensor(alone["seen"]), rtol=2e-5, atol=1e-5
            )
        weights = load_file(tmp_path / f"{name}.safetensors")
        for key, value in weights.items():
            torch.testing.assert_close(value, alone["weights"][key], rtol=1e-3, atol=2e-5)
    for stage in ("zero1", "zero2", "zero3"):
        for what in ("weights", "optimizer"):
            assert held[stage][what] <= 0.55 * held["ddp"][what], (stage, what)
    sharded = [json.loads((tmp_path / f"agc-{rank}.json").read_text()) for rank in (0, 1)]
    clips(SingleProcess(), tmp_path)
    expected = json.loads((tmp_path / "agc-0.json").read_text())
    for found in sharded:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert expected[0][3] < 0.5 * expected[0][2], "rows were clipped"


@pytest.mark.slow
def test_four_ranks_in_two_replicas_equal_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    launch(train_under_plans, 4, tmp_path, tmp_path, ("hybrid",), STEPS)
    seen, held = json.loads((tmp_path / "hybrid-3.json").read_text())
    torch.testing.assert_close(
        torch.tensor(seen), torch.tensor(alone["seen"]), rtol=2e-5, atol=1e-5
    )
    assert held["weights"] > 0


def test_resume_and_uneven_ranks(tmp_path: Path) -> None:
    launch(resume_all, 2, tmp_path, tmp_path, ("zero3", "ddp"), 2)
    weights = [json.loads((tmp_path / f"unequal-{n}-0.json").read_text()) for n in ("ddp", "zero3")]
    torch.testing.assert_close(torch.tensor(weights[0]), torch.tensor(weights[1]))
    for rank in (0, 1):
        other = json.loads((tmp_path / f"unequal-zero1-{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(other), torch.tensor(weights[0]))

    alone = Trainer(PLANS["single"])
    alone.stream.world = 2
    expected = torch.tensor(alone.train(3))
    for name in ("ddp", "zero3"):
        for rank in (0, 1):
            seen = json.loads((tmp_path / f"spared-{name}-{rank}.json").read_text())
            torch.testing.assert_close(torch.tensor(seen), expected, rtol=1e-4, atol=1e-5)

    # What two processes wrote, one can open; its data come from the shared place.
    trainer = Trainer(PLANS["single"])
    for name in ("zero3", "ddp"):
        store = CheckpointStore(tmp_path / f"{name}-checkpoints")
        assert store.restore_latest(trainer.state) == 2
        whole = Trainer(PLANS["single"])
        expected = whole.train(4)[2:]
        torch.testing.assert_close(
            torch.tensor(trainer.train(2)), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )


def test_torchrun_with_a_single_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TreadleError, match="set plan to DDP"):
        SingleProcess().setup("cpu")


def test_plans_alone_are_the_single_process() -> None:
    """Without torchrun a parallel plan is a run of one process."""
    expected = Trainer(SingleProcess()).train(2)
    try:
        for plan in (DDP(), FSDP()):
            found = Trainer(plan).train(2)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
        with pytest.raises(ConfigError, match="replicas=2 must divide 1"):
            FSDP(replicas=2).setup("cpu")
    finally:
        DDP().close()


def test_device_is_checked() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert pick_device("") == torch.device("cpu")
        with pytest.raises(TreadleError, match="`cuda` is not there"):
            pick_device("cuda")
