"""Rewards under a limit on cost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from alignment.constrained_workers import (
    ROLLOUTS,
    ConstrainedLetters,
    Dangerous,
    env,
    multipliers,
    share,
)
from tiny_generation import tiny_model
from train.processes import launch

from treadle.alignment.constrained import ConstrainedRollouts
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Silent
from treadle.data.source import Source
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32


class Log(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Costs(Hook):
    def __init__(self) -> None:
        self.cost: list[float] = []
        self.reward: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.cost.append(report.metrics["cost"])
        self.reward.append(report.metrics["reward"])


def train(source: Source, folder: Path, steps: int, seed: int) -> Costs:
    model, costs, plan = tiny_model(seed=seed), Costs(), SingleProcess()
    fit(
        model,
        source.open(replace(env(model, folder), seed=1000 * seed)),
        GRPO(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=steps, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder / "checkpoints",
        hooks=[costs],
    )
    return costs


def test_cost_is_held_under_its_limit(tmp_path: Path) -> None:
    """The multiplier begins where danger pays best, and must rise to turn the policy to what is
    safe; three models. Without it danger wins."""
    many = ROLLOUTS.replace(completions=16)
    source = ConstrainedRollouts(
        rollouts=many, cost=Dangerous(), limit=0.05, multiplier=0.3, rate=0.1
    )
    begun, ended, highest, cost = [], [], [], []
    for seed in range(3):
        held = train(source, tmp_path / f"held-{seed}", 32, seed)
        safe = [2 * (reward - cost) for reward, cost in zip(held.reward, held.cost, strict=True)]
        begun.append(sum(safe[:5]) / 5)
        ended.append(sum(safe[-10:]) / 10)
        cost.append(sum(held.cost[-10:]) / 10)
        highest.append(max(held.cost))
    assert sum(cost) / 3 < 0.05
    assert sum(highest) / 3 > 2 * 0.05
    assert sum(ended) / 3 > 0.8
    assert sum(ended) > 1.8 * sum(begun)
    free = train(source.replace(multiplier=1e-9, rate=1e-9), tmp_path / "free", 32, 0)
    assert sum(free.cost[-3:]) / 3 > 0.5


def test_the_multiplier_and_the_rewards(tmp_path: Path) -> None:
    source = ConstrainedRollouts(
        rollouts=ROLLOUTS, cost=Dangerous(), limit=0.5, rate=0.2, multiplier=2.0
    )
    stream = source.open(env(tiny_model(), tmp_path))
    groups = stream.rollouts.roll()
    shaped = stream._shaped(groups)
    for row, group in zip(shaped.rewards, groups, strict=True):
        for value, completion in zip(row, group.completions, strict=True):
            r = ConstrainedLetters().score(group.problem, completion.text)
            assert float(value) == pytest.approx((r - 2 * share(completion.text, "n", "z")) / 3)
    expected = 2 * math.exp(0.2 * (shaped.metrics["cost"] - 0.5) / 0.5)
    assert stream.multiplier == pytest.approx(expected)
    again = source.open(env(tiny_model(), tmp_path))
    again.restore(stream.state())
    assert again.multiplier == stream.multiplier


def test_costs_that_fail_count_as_the_highest(tmp_path: Path) -> None:
    source = ConstrainedRollouts(rollouts=ROLLOUTS, cost=Dangerous(broken=True), limit=0.5)
    log = Log()
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()), log)
    stream = source.open(replace(env(tiny_model(), tmp_path), workspace=workspace))
    groups = stream.rollouts.roll()
    shaped = stream._shaped(groups)
    odd = [len(c.text) % 2 for g in groups for c in g.completions]
    assert shaped.metrics["costs_failed"] == sum(odd) > 0
    assert log.lines == ["rollouts: a cost is taken for the highest: ValueError: no idea"]
    assert shaped.metrics["cost"] >= sum(odd) / len(odd)


@pytest.mark.distributed
def test_two_ranks_have_the_multiplier_of_one(tmp_path: Path) -> None:
    """Each has other answers, whose costs differ, but both learn from the same reward."""
    launch(multipliers, 2, tmp_path, tmp_path)
    multipliers(tmp_path)
    alone, *ranks = (
        json.loads((tmp_path / f"multipliers-{name}.json").read_text())
        for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert alone[0][2] != alone[0][1]
    for found in ranks:
        assert found == [pytest.approx(row) for row in alone]


@pytest.mark.parametrize(("limit", "bound"), [(1e-6, 100.0), (1.0, 0.01)])
def test_the_multiplier_stays_where_it_can_come_back_from(
    tmp_path: Path, limit: float, bound: float
) -> None:
    """However far the costs are from the limit, and however long."""
    source = ConstrainedRollouts(rollouts=ROLLOUTS, cost=Dangerous(), limit=limit, rate=1.0)
    stream = source.open(env(tiny_model(), tmp_path))
    groups = stream.rollouts.roll()
    for _ in range(20):
        stream._shaped(groups)
    assert stream.multiplier == pytest.approx(bound)
