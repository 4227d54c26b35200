"""Hooks: files that read as if the run had never stopped, TensorBoard, progress, evaluation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from treadle.core.errors import TreadleError
from treadle.core.progress import Progress, Task
from treadle.data.source import Limit
from treadle.train.hooks import (
    Every,
    Hook,
    JsonLines,
    RunInfo,
    ShowProgress,
    StepReport,
    TensorBoard,
    WarnAbove,
)


def report(step: int, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": step,
        "steps": 10,
        "loss": 1.0 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "seconds": 0.5,
        "metrics": {"accuracy": 0.25},
    }
    return StepReport(**{**values, **changes})


def info(folder: Path, start: int = 0) -> RunInfo:
    return RunInfo(folder=folder, steps=10, start=start, config="kind: Run\n")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    straight, stopped = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl")
    for hook, runs in ((straight, [(0, 6)]), (stopped, [(0, 5), (3, 6)])):
        for start, end in runs:
            hook.on_start(info(tmp_path, start))
            for step in range(start + 1, end + 1):
                hook.on_step(report(step))
                if step % 2 == 0:
                    hook.on_metrics(step, {"validation": 2.0})
            hook.on_end()
            with hook.path.open("a") as file:
                file.write('{"step": 6, "loss": 0.')  # killed while writing
    expected = (tmp_path / "a.jsonl").read_text()
    assert (tmp_path / "b.jsonl").read_text() == expected
    stopped.on_start(info(tmp_path, 6))
    stopped.on_end()
    assert [r["step"] for r in rows(tmp_path / "b.jsonl")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_rewind_and_not_a_number(tmp_path: Path) -> None:
    hook = JsonLines(tmp_path / "deep" / "m.jsonl")
    hook.on_start(info(tmp_path))
    for step in (1, 2, 3):
        hook.on_step(report(step, loss=math.nan if step == 1 else 1.0, skipped=step == 1))
    hook.on_rewind(1)
    hook.on_step(report(2, loss=7.0))
    hook.on_end()
    assert [(r["step"], r["loss"], r["skipped"]) for r in rows(hook.path)] == [
        (1, None, True),
        (2, 7.0, False),
    ]
    assert rows(hook.path)[0]["accuracy"] == 0.25


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hook = TensorBoard(tmp_path)
    hook.on_start(info(tmp_path))
    for step in (1, 2, 3, 4):
        hook.on_step(report(step))
    hook.on_end()
    hook.on_start(info(tmp_path, 2))
    hook.on_step(report(3, loss=9.0))
    hook.on_metrics(3, {"validation": 5.0})
    hook.on_end()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    points = [(e.step, e.value) for e in events.Scalars("loss")]
    assert points == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert events.Scalars("tokens_per_second")[0].value == 200.0
    assert events.Scalars("validation")[0].value == 5.0


def test_tensorboard_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TreadleError, match=r"treadle\[tracking\]"):
        TensorBoard(tmp_path).on_start(info(tmp_path))


class Heard(Progress, Task):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.updates: list[tuple[float, str]] = []
        self.closed = 0

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        self.said.append(f"task {name} {total:g}")
        return self

    def say(self, line: str) -> None:
        self.said.append(line)

    def update(self, completed: float, *, note: str = "") -> None:
        self.updates.append((completed, note))

    def close(self) -> None:
        self.closed += 1


def test_progress_shows_loss_speed_and_what_went_wrong(tmp_path: Path) -> None:
    heard = Heard()
    hook = ShowProgress(heard, "sft")
    hook.on_start(info(tmp_path, 4))
    hook.on_step(report(5))
    hook.on_step(report(6, skipped=True, grad_norm=math.inf))
    hook.on_rewind(4)
    hook.on_end()
    hook.on_end()
    assert heard.said[0] == "task sft 10"
    assert "after step 4 of 10" in heard.said[1]
    assert heard.updates[1] == (5, "loss 0.2000, 200 tokens/s")
    assert "step 6 skipped" in heard.said[2]
    assert "back to the checkpoint after step 4" in heard.said[3]
    assert heard.closed == 1


def test_every_measures_on_time_and_at_the_end(tmp_path: Path) -> None:
    class Listener(Hook):
        def __init__(self) -> None:
            self.heard: list[tuple[int, float]] = []

        def on_step(self, report: StepReport) -> None:
            raise AssertionError

        def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
            self.heard.append((step, metrics["loss"]))

    listener = Listener()
    hook = Every(4, lambda r: {"loss": 10.0 * r.step}, [listener])
    for step in range(1, 11):
        hook.on_step(report(step))
    assert listener.heard == [(4, 40.0), (8, 80.0), (10, 100.0)]
    with pytest.raises(TreadleError, match="steps=0"):
        Every(0, lambda r: {})


def test_metrics_above_their_limit_are_named() -> None:
    """At each crossing, with the remedy; at the end how often; never at or below the limit."""
    heard = Heard()
    hook = WarnAbove(heard, "grpo")
    limits = (Limit("mismatch", 0.1, "use OwnWeights"), Limit("absent", 0.0, "none"))
    for step, value in enumerate((0.1, 0.2, 0.3, 0.05, 0.11), 1):
        hook.on_step(report(step, metrics={"mismatch": value}, limits=limits))
    assert heard.said == [
        "grpo: step 2: mismatch 0.2 is above 0.1: use OwnWeights",
        "grpo: step 5: mismatch 0.11 is above 0.1: use OwnWeights",
    ]
    hook.on_end()
    assert heard.said[2:] == ["grpo: mismatch was above its limit in 3 of 5 steps"]
