"""What the processes of the parallel tests do; results go to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from train.tiny import TinyStream, tiny_model

from treadle.core.errors import TreadleError
from treadle.data.source import Stream, Work
from treadle.models.decoder import DecoderModel
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.clipping import AGC, NormClip, gradient_norm, scale_gradients
from treadle.optim.optimizer import Clip
from treadle.optim.schedules import Cosine
from treadle.train.checkpoint import CheckpointStore
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.ddp import DDP
from treadle.train.parallel.fsdp import FSDP
from treadle.train.parallel.plan import Plan, SingleProcess, World
from treadle.train.precision import BF16, FP32
from treadle.train.recompute import Recompute
from treadle.train.rng import RandomState
from treadle.train.state import TrainState
from treadle.train.step import summed_gradients

PLANS: Mapping[str, Plan] = {
    "single": SingleProcess(),
    "ddp": DDP(),
    "zero1": FSDP(stage=1),
    "zero2": FSDP(stage=2),
    "zero3": FSDP(stage=3),
    "offload": FSDP(stage=3, offload=True),
    "hybrid": FSDP(stage=3, replicas=2),
}


class Trainer:
    """A run under a plan; `uneven` gives the ranks different numbers of micro-batches."""

    def __init__(
        self, plan: Plan, *, seed: int = 0, clip: Clip = NormClip(max_norm=0.5), micro: int = 2
    ) -> None:
        self.plan = plan
        self.world: World = plan.setup("cpu")
        # Ranks start from different weights: the plan must make them those of rank 0.
        self.model: DecoderModel = tiny_model(seed + self.world.rank)
        self.model.blocks[0].mixer.q.weight.requires_grad_(False)
        plan.wrap(self.model)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        self.optimizer = AdamW(lr=1e-2, weight_decay=0.1).build(named)
        self.clipper = clip.build()
        rank, size = self.world.rank, self.world.size
        self.stream: TinyStream | Spared = TinyStream(count=9, micro=micro, rank=rank, world=size)
        self.state = TrainState(
            model=self.model,
            optimizer=self.optimizer,
            stream=self.stream,
            parts={"random": RandomState()},
        )

    def train(self, steps: int) -> list[list[float]]:
        seen = []
        for _ in range(steps):
            sums = summed_gradients(
                self.model,
                CausalLM(),
                next(self.stream),
                self.world,
                self.plan,
                FP32(),
                FP32().scaler(),
            ).over_ranks(self.plan)
            scale_gradients(self.parameters, 1.0 / sums["weight"])
            norm = self.clipper(self.parameters)
            after = gradient_norm(self.parameters)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seen.append([sums["total"], sums["weight"], norm, after])
        return seen


def local_bytes(trainer: Trainer) -> dict[str, int]:
    """What this rank holds between two steps."""

    def size(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    states = trainer.optimizer.state.values()
    return {
        "weights": sum(map(size, trainer.model.parameters())),
        "optimizer": sum(size(v) for s in states for v in s.values() if v.ndim),
    }


def train_under_plans(folder: Path, names: tuple[str, ...], steps: int) -> None:
    for name in names:
        trainer = Trainer(PLANS[name])
        seen = trainer.train(steps)
        full = trainer.plan.full_state(trainer.model)
        rank = trainer.world.rank
        (folder / f"{name}-{rank}.json").write_text(json.dumps([seen, local_bytes(trainer)]))
        assert bool(full) == (rank == 0)
        if rank == 0:
            save_file(
                {n: t.clone() for n, t in full.items() if n != "head.weight"},
                folder / f"{name}.safetensors",
            )
        if name == names[0]:
            clips(trainer.plan, folder)
    trainer.plan.barrier()
    trainer.plan.close()


def clips(plan: Plan, folder: Path) -> None:
    """Row-wise clipping sees whole rows of sharded parameters."""
    trainer = Trainer(plan, clip=AGC(ratio=0.02))
    seen = trainer.train(2)
    (folder / f"agc-{trainer.world.rank}.json").write_text(json.dumps(seen))


def resume_under_plan(folder: Path, name: str, steps: int) -> None:
    """Train 2 x steps; beside it save after `steps`, restore into a fresh trainer, go on."""
    whole = Trainer(PLANS[name])
    expected = whole.train(2 * steps)
    first = Trainer(PLANS[name])
    assert first.train(steps) == expected[:steps]
    store = CheckpointStore(folder / f"{name}-checkpoints")
    store.save(steps, first.state)
    second = Trainer(PLANS[name])
    with torch.no_grad():
        for parameter in second.parameters:
            parameter.mul_(3.0)
    assert store.restore_latest(second.state) == steps
    found = second.train(steps)
    assert found == expected[steps:], (found, expected[steps:])
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in (a, b)]
        assert torch.equal(*local)
    if name != "ddp":
        with pytest.raises(TreadleError, match=r"mixer\.q\.weight` holds other values"):
            store.restore_latest(Trainer(PLANS[name], seed=50).state)
        broken_save(store, second)


def broken_save(store: CheckpointStore, trainer: Trainer) -> None:
    """Where rank 0 cannot write, every rank hears why, and none waits for ever."""
    blocked = store.folder / "step-000099"
    if trainer.world.rank == 0:
        blocked.write_text("a file is in the way")
    trainer.plan.barrier()
    with pytest.raises(TreadleError, match="this is a file"):
        store.save(99, trainer.state)
    trainer.plan.barrier()
    if trainer.world.rank == 0:
        blocked.unlink()


def resume_all(folder: Path, names: tuple[str, ...], steps: int) -> None:
    for name in names:
        resume_under_plan(folder, name, steps)
    unequal_micro_batches(folder)
    one_rank_learns(folder)
    recompute_and_mixed(folder)


class Spared(Stream):
    """Rank 1 has nothing to learn from, but a batch to keep in step with."""

    def __init__(self, stream: TinyStream) -> None:
        self.stream = stream

    def __next__(self) -> Work:
        work = next(self.stream)
        return work if self.stream.rank == 0 else Work((), spare=work.batches[0])

    def state(self) -> dict[str, Any]:
        return self.stream.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state)


def one_rank_learns(folder: Path) -> None:
    for name in ("ddp", "zero3"):
        trainer = Trainer(PLANS[name])
        trainer.stream = Spared(trainer.stream)
        seen = trainer.train(3)
        (folder / f"spared-{name}-{trainer.world.rank}.json").write_text(json.dumps(seen))


def unequal_micro_batches(folder: Path) -> None:
    """Rank 1 has one micro-batch where rank 0 has three."""
    for name in ("ddp", "zero1", "zero3"):
        trainer = Trainer(PLANS[name])
        trainer.stream.micro = 3 if trainer.world.rank == 0 else 1
        seen = trainer.train(3)
        (folder / f"unequal-{name}-{trainer.world.rank}.json").write_text(json.dumps(seen))


def recompute_and_mixed(folder: Path) -> None:
    """Sharding, recomputation and bf16 together still learn."""
    plan = PLANS["zero3"]
    world = plan.setup("cpu")
    model = Recompute()(tiny_model())
    BF16().prepare(model)
    plan.wrap(model)
    named = list(model.named_parameters())
    optimizer = AdamW(lr=1e-2).build(named)
    stream = TinyStream(rank=world.rank, world=world.size, cycle=2)
    losses = []
    for _ in range(12):
        sums = summed_gradients(
            model, CausalLM(), next(stream), world, plan, BF16(), BF16().scaler()
        ).over_ranks(plan)
        scale_gradients([p for _, p in named], 1.0 / sums["weight"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sums["total"] / sums["weight"])
    assert losses[-1] < 0.8 * losses[0], losses


class Stop(Hook):
    """Ends a run as an error would, on every rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            raise InterruptedError


def fit_under_plans(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        fit_under_plan(folder / f"{name}-a", PLANS[name], folder / f"{name}.safetensors")
        twice = folder / f"{name}-b"
        with pytest.raises(InterruptedError):
            fit_under_plan(twice, PLANS[name], folder / "never", hooks=(Stop(6),))
        fit_under_plan(twice, PLANS[name], folder / f"{name}-resumed.safetensors")


def fit_under_plan(folder: Path, plan: Plan, out: Path, hooks: tuple[Hook, ...] = ()) -> None:
    world = plan.setup("cpu")
    model = tiny_model()
    fit(
        model,
        TinyStream(count=7, micro=2, rank=world.rank, world=world.size),
        CausalLM(),
        optimizer=AdamW(lr=1e-2),
        schedule=Cosine(),
        config=Fit(steps=9, precision=FP32(), checkpoint_every=4),
        plan=plan,
        world=world,
        folder=folder,
        hooks=hooks,
    )
    weights = plan.full_state(model)
    if world.rank == 0:
        save_file({n: t for n, t in weights.items() if n != "head.weight"}, out)
