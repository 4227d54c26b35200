"""Tiny policies that learn in one process, and what was measured on the way."""

from __future__ import annotations

from treadle.data.source import Env, Source
from treadle.objectives.objective import Objective
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32


class Seen(Hook):
    """The metrics of each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_step(self, report: StepReport) -> None:
        self.metrics.append(dict(report.metrics))

    def early(self, name: str, steps: int) -> float:
        """The mean over the first steps."""
        return sum(m[name] for m in self.metrics[:steps]) / steps

    def late(self, name: str, steps: int) -> float:
        """The mean over the last steps."""
        return sum(m[name] for m in self.metrics[-steps:]) / steps


def learn(env: Env, source: Source, steps: int, objective: Objective | None = None) -> Seen:
    """Train the model of `env`, by GRPO unless told otherwise."""
    seen, plan = Seen(), SingleProcess()
    fit(
        env.model,
        source.open(env),
        objective or GRPO(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=steps, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=env.scratch / "checkpoints",
        hooks=[seen],
    )
    return seen
