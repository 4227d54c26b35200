"""Hooks: they watch a run and never change it.

Steps are counted from 1 in reports: after the report of step n, n steps are done, and a
checkpoint taken then is `step-n`.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from treadle.core.errors import TreadleError
from treadle.core.progress import Progress, Task
from treadle.data.source import Limit


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a hook knows before the first step."""

    folder: Path
    steps: int
    start: int = 0
    """Steps that were done before, where a run goes on."""
    rank: int = 0
    world: int = 1
    config: str = ""
    """The run's YAML."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step, summed over micro-batches and ranks."""

    step: int
    """From 1."""
    steps: int
    loss: float
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False
    limits: tuple[Limit, ...] = ()


class Hook(ABC):
    """Watches a run. Only the first rank has hooks, except where one says otherwise."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first step; `run.start` steps are done already."""
        return

    @abstractmethod
    def on_step(self, report: StepReport) -> None:
        """After each step, taken or skipped."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Further measures, such as an evaluation after step `step`."""
        return

    def on_rewind(self, step: int) -> None:
        """The run goes back to where `step` steps were done; what came after did not happen."""
        return

    def on_end(self) -> None:
        """After the last step, and after an error."""
        return


class JsonLines(Hook):
    """One JSON object a line: step reports and further metrics, flushed as they come.

    A run that goes on from step n cuts off what a killed process had written after it, so the
    file reads like that of a run that never stopped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def on_start(self, run: RunInfo) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.on_rewind(run.start)

    def on_rewind(self, step: int) -> None:
        self.on_end()
        cut_after(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def on_step(self, report: StepReport) -> None:
        row = asdict(report)
        metrics = row.pop("metrics")
        del row["limits"]
        self._write({**row, **metrics})

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self.file is not None, "on_start comes first"
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()

    def on_end(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of `path` that tell of steps after `step`, and a last line that is torn."""
    if not path.exists():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                break
            if not row or row["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


class TensorBoard(Hook):
    """Scalars for TensorBoard, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        self.on_rewind(run.start)
        if run.config and run.start == 0:
            self.writer.add_text("run", f"```yaml\n{run.config}\n```", 0)

    def on_rewind(self, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise TreadleError(
                "TensorBoard needs tensorboardX: pip install 'treadle[tracking]'"
            ) from None
        self.on_end()
        # Points at or after purge_step that an earlier process wrote are hidden.
        purge = step + 1 if step else None
        # Its file names count seconds, and a second writer would empty the first one's file.
        unique = f".{time.time_ns():020d}"
        self.writer = SummaryWriter(str(self.folder), purge_step=purge, filename_suffix=unique)

    def on_step(self, report: StepReport) -> None:
        speed = report.tokens / report.seconds if report.seconds > 0 else 0.0
        self.on_metrics(
            report.step,
            {
                "loss": report.loss,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "tokens_per_second": speed,
                **report.metrics,
            },
        )

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


class ShowProgress(Hook):
    """A bar, or lines in a log, with loss and speed."""

    def __init__(self, progress: Progress, name: str = "train") -> None:
        self.progress, self.name = progress, name
        self.task: Task | None = None
        self.speed = 0.0

    def on_start(self, run: RunInfo) -> None:
        self.task = self.progress.task(self.name, run.steps)
        if run.start:
            self.progress.say(f"{self.name}: goes on after step {run.start} of {run.steps}")
        self.task.update(run.start)

    def on_step(self, report: StepReport) -> None:
        assert self.task is not None, "on_start comes first"
        now = report.tokens / report.seconds if report.seconds > 0 else 0.0
        self.speed = now if self.speed == 0.0 else 0.9 * self.speed + 0.1 * now
        if report.skipped:
            self.progress.say(
                f"{self.name}: step {report.step} skipped (loss {report.loss:.4g}, "
                f"gradient norm {report.grad_norm:.4g})"
            )
        self.task.update(report.step, note=f"loss {report.loss:.4f}, {self.speed:,.0f} tokens/s")

    def on_rewind(self, step: int) -> None:
        self.progress.say(f"{self.name}: back to the checkpoint after step {step}")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.progress.say(f"{self.name}: step {step}: {shown}")

    def on_end(self) -> None:
        if self.task is not None:
            self.task.close()
        self.task = None


class WarnAbove(Hook):
    """Says so when a metric goes above its limit, and at the end how often it was there."""

    def __init__(self, progress: Progress, name: str = "train") -> None:
        self.progress, self.name = progress, name
        self.steps = 0
        self.above: dict[str, int] = {}
        self.now: set[str] = set()

    def on_step(self, report: StepReport) -> None:
        self.steps += 1
        for limit in report.limits:
            value = report.metrics.get(limit.metric, 0.0)
            if value <= limit.most:
                self.now.discard(limit.metric)
                continue
            self.above[limit.metric] = self.above.get(limit.metric, 0) + 1
            if limit.metric not in self.now:
                self.now.add(limit.metric)
                self.progress.say(
                    f"{self.name}: step {report.step}: {limit.metric} {value:.3g} is above "
                    f"{limit.most:g}: {limit.remedy}"
                )

    def on_end(self) -> None:
        for metric, count in self.above.items():
            self.progress.say(
                f"{self.name}: {metric} was above its limit in {count} of {self.steps} steps"
            )
        self.above.clear()


class Every(Hook):
    """Calls `measure` every `steps` steps and after the last one, and tells `listeners`."""

    def __init__(
        self,
        steps: int,
        measure: Callable[[StepReport], Mapping[str, float]],
        listeners: Sequence[Hook] = (),
    ) -> None:
        if steps < 1:
            raise TreadleError(f"Every: steps={steps}; give 1 or more")
        self.steps, self.measure, self.listeners = steps, measure, tuple(listeners)

    def on_step(self, report: StepReport) -> None:
        if report.step % self.steps == 0 or report.step == report.steps:
            metrics = self.measure(report)
            for listener in self.listeners:
                listener.on_metrics(report.step, metrics)
