"""The whole loop: exact resume after a kill, accumulation, NaN and spikes, ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_generation import byte_tokenizer
from torch import Tensor, nn
from train.processes import launch
from train.tiny import CountedLM, TinyStream, tiny_model
from train.workers import fit_under_plans

from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.source import Env, Source, Stream, Work
from treadle.models.source import ModelSource, Opened
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.clipping import ZClip
from treadle.optim.schedules import Cosine
from treadle.train.fit import Fit, FitResult, fit
from treadle.train.guard import Guard
from treadle.train.hooks import Hook, JsonLines, StepReport
from treadle.train.parallel.plan import Plan, SingleProcess, World
from treadle.train.precision import BF16, FP16, FP32, Precision
from treadle.train.run import Run
from treadle.train.step import summed_gradients


class Watch(Hook):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.rewinds: list[int] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_rewind(self, step: int) -> None:
        self.rewinds.append(step)


def run(
    folder: Path,
    *,
    steps: int = 12,
    hooks: tuple[Hook, ...] = (),
    guard: Guard = Guard(),
    precision: Precision = FP32(),
    every: int = 4,
    lr: float = 1e-2,
    **stream: Any,
) -> tuple[FitResult, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = tiny_model()
    plan = SingleProcess()
    result = fit(
        model,
        TinyStream(**stream),
        CountedLM(),
        optimizer=AdamW(lr=lr, weight_decay=0.1),
        schedule=Cosine(),
        config=Fit(
            steps=steps,
            clip=ZClip(warmup=3),
            precision=precision,
            guard=guard,
            checkpoint_every=every,
        ),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder / "checkpoints",
        hooks=hooks,
    )
    return result, plan.full_state(model)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


KILLED = """
import os, signal, sys
from pathlib import Path
from train.test_train_fit import run
from treadle.train.hooks import Hook, JsonLines

class Kill(Hook):
    def on_step(self, report):
        if report.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
run(folder, hooks=(JsonLines(folder / "metrics.jsonl"), Kill()))
"""


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, expected = run(whole, hooks=(JsonLines(whole / "metrics.jsonl"),))
    for step in (3, 8, 10):  # before any checkpoint, at one, between two
        command = [sys.executable, "-c", KILLED, str(killed), str(step)]
        ran = subprocess.run(command, check=False, env=environment())
        assert ran.returncode == -signal.SIGKILL
    _, found = run(killed, hooks=(JsonLines(killed / "metrics.jsonl"),))
    assert same(expected, found)
    assert lines(killed) == lines(whole)
    # A finished run that is started again has nothing to do.
    again, weights = run(killed)
    assert (again.steps, again.tokens) == (12, 0)
    assert same(weights, expected)


def environment() -> dict[str, str]:
    here = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": f"{here.parent / 'src'}{os.pathsep}{here}"}


def test_accumulation_in_any_number_of_parts(tmp_path: Path) -> None:
    one, four = Watch(), Watch()
    _, expected = run(tmp_path / "1", hooks=(one,), micro=1)
    _, found = run(tmp_path / "4", hooks=(four,), micro=4)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
    for a, b in zip(one.reports, four.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
        assert a.metrics["accuracy"] == pytest.approx(b.metrics["accuracy"], abs=0.02)
        assert a.tokens == b.tokens


def test_planted_nan_is_skipped(tmp_path: Path) -> None:
    watch = Watch()
    result, weights = run(tmp_path, hooks=(watch,), poison={5: float("nan")})
    assert [r.step for r in watch.reports if r.skipped] == [6]
    assert result.skipped == 1
    (event,) = result.events
    assert (event.step, event.reason, len(event.data)) == (5, "loss is nan", 16)
    assert all(bool(w.isfinite().all()) for w in weights.values())
    assert watch.reports[-1].loss < watch.reports[0].loss


def test_planted_spikes_are_skipped_then_rolled_back(tmp_path: Path) -> None:
    """Steps 14 and 15 are poisoned; the second in a row sends the run back to step 12."""
    watch = Watch()
    guard = Guard(z=6.0, window=8, warmup=8, patience=2, lead=0)
    poison = {14: 50.0, 15: 50.0, 18: 50.0}
    result, weights = run(
        tmp_path, steps=24, hooks=(watch,), guard=guard, poison=poison, cycle=3, lr=1e-3
    )
    assert watch.rewinds == [12]
    taken = [r.step for r in watch.reports]
    assert taken == [*range(1, 16), *range(13, 25)]
    assert [r.step for r in watch.reports[15:] if r.skipped] == [15, 16, 19]
    assert result.steps == 24

    # It is, bit for bit, the run in which those three steps were passed over at once.
    patient = guard.replace(patience=5)
    _, expected = run(
        tmp_path / "patient", steps=24, guard=patient, poison=poison, cycle=3, lr=1e-3
    )
    assert same(weights, expected)


def test_no_checkpoint_amid_bad_steps(tmp_path: Path) -> None:
    """Step 8, where one is due, is poisoned like the one before: it is written after step 9."""
    kept: list[list[str]] = []

    class Look(Hook):
        def on_step(self, report: StepReport) -> None:
            folder = tmp_path / "checkpoints"
            kept.append(sorted(p.name for p in folder.glob("step-*")))

    nan = float("nan")
    run(tmp_path, steps=11, hooks=(Look(),), poison={6: nan, 7: nan})
    assert kept[8] == ["step-000000", "step-000004"]
    assert kept[9] == ["step-000004", "step-000009"]


def test_hopeless_run_ends_with_a_remedy(tmp_path: Path) -> None:
    guard = Guard(patience=2, rollbacks=1)
    poison = dict.fromkeys(range(6, 40), float("nan"))
    with pytest.raises(TreadleError, match=r"unstable.*optimizer\.lr"):
        run(tmp_path, steps=40, guard=guard, poison=poison)


def test_fp16_finds_its_scale_without_alarming_the_guard(tmp_path: Path) -> None:
    watch = Watch()
    precision = FP16(initial_scale=2.0**24)
    result, _ = run(tmp_path, steps=30, hooks=(watch,), precision=precision, cycle=4)
    skipped = [r.step for r in watch.reports if r.skipped]
    assert len(skipped) > Guard().patience
    assert skipped == list(range(1, len(skipped) + 1)), "all at the start"
    assert not watch.rewinds
    assert result.loss < watch.reports[0].loss


def test_a_step_without_a_batch_is_a_clear_error() -> None:
    plan, precision = SingleProcess(), FP32()
    world, scaler = plan.setup("cpu"), precision.scaler()
    with pytest.raises(TreadleError, match="process 0 of 1 has no batch in a step"):
        summed_gradients(tiny_model(), CausalLM(), Work(()), world, plan, precision, scaler)


class MetaDevice(Plan):
    """A plan for a device that is not the one where models are loaded."""

    def setup(self, device: str = "") -> World:
        return World(rank=0, size=1, device=torch.device("meta"))

    def wrap(self, model: nn.Module) -> None:
        raise AssertionError

    def begin(self, model: nn.Module, *, last: bool) -> None:
        raise AssertionError

    def finish(self, model: nn.Module) -> None:
        raise AssertionError

    def rounds(self, batches: int) -> int:
        raise AssertionError


class AsksTheModel(Source):
    """Needs the model as soon as it opens, as references do."""

    def open(self, env: Env) -> Stream:
        assert {str(p.device) for p in env.model.parameters()} == {env.device} == {"meta"}
        for p in env.model.parameters():
            assert p.dtype is (torch.float32 if p.requires_grad else torch.bfloat16)
        raise InterruptedError


def test_a_source_opens_with_the_model_as_it_is_trained(tmp_path: Path) -> None:
    class SavedTokenizer(ModelSource):
        def open(self, workspace: Workspace) -> Opened:
            byte_tokenizer().save(tmp_path / "tokenizer")
            model = tiny_model()
            model.embedding.requires_grad_(False)
            return Opened(model, tmp_path / "tokenizer")

    step = Run(
        model=SavedTokenizer(),
        source=AsksTheModel(),
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        fit=Fit(steps=1, precision=BF16()),
        plan=MetaDevice(),
    )
    with pytest.raises(InterruptedError):
        step.execute(Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=(step,))))


@pytest.mark.distributed
def test_two_ranks_through_the_whole_loop_equal_one(tmp_path: Path) -> None:
    """And a run of two ranks that was interrupted equals one that was not, bit for bit."""
    launch(fit_under_plans, 2, tmp_path, tmp_path, ("ddp", "zero3"))
    fit_under_plans(tmp_path, ("single",))
    expected = load_file(tmp_path / "single.safetensors")
    for name in ("ddp", "zero3"):
        straight = load_file(tmp_path / f"{name}.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(straight[key], value, rtol=1e-3, atol=1e-4)
        assert same(straight, load_file(tmp_path / f"{name}-resumed.safetensors"))
