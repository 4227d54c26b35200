"""Three rounds: the model's own answers are compared, and it learns from the verdicts."""

from __future__ import annotations

from treadle.alignment.iterate import Compare, PairsOf, WinRate
from treadle.alignment.preferences import Preferences
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.core.pipeline import Pipeline, Step
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.expert_iteration import expert_iteration
from treadle.recipes.families import QUICKSTART
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

ROUNDS = 3


def iterate() -> Pipeline:
    steps: list[Step] = [expert_iteration().steps[0]]
    problems = ReasoningGym(families=QUICKSTART, seed=1)
    now = "sft"
    for number in range(1, ROUNDS + 1):
        compare = Compare(
            name=f"label-{number}",
            model=Trained(step=now),
            problems=problems,
            first=1000 * number,
            minutes=2.0,
        )
        train = Run(
            name=f"round-{number}",
            model=Trained(step=now),
            source=Preferences(pairs=PairsOf(step=compare.name), per_step=16),
            objective=DPO(beta=0.1),
            optimizer=AdamW(lr=1e-4),
            schedule=Constant(),
            fit=Fit(steps=8, checkpoint_every=4),
            minutes=2.0,
        )
        now = train.name
        win = WinRate(
            name=f"win-{number}",
            subject=now,
            model=Trained(step=now),
            against=Trained(step="sft"),
            problems=problems.replace(split="heldout"),
        )
        steps += [compare, train, win]
    return Pipeline(name="iterate", steps=(*steps, Report()))
