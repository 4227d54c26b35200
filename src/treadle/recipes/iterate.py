"""Three rounds: the model's own answers are compared, and it learns from the verdicts."""

from __future__ import annotations

from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.iterate import Compare, EveryPair, PairsOf, WinRate
from treadle.alignment.preferences import Preferences
from treadle.core.pipeline import Pipeline, Step
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.lora import LoRA
from treadle.recipes.instructed import BASE, LONGEST, UNSEEN, followed
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

ROUNDS = 3


def iterate() -> Pipeline:
    steps: list[Step] = [followed("base", BASE)]
    now: ModelSource = BASE
    for number in range(1, ROUNDS + 1):
        compare = Compare(
            name=f"label-{number}",
            model=now,
            problems=FollowInstructions(seed=1),
            first=1000 * number,
            count=96,
            completions=8,
            pairing=EveryPair(),
            sampling=Sampling(max_tokens=LONGEST),
            minutes=2.0,
        )
        train = Run(
            name=f"round-{number}",
            model=now,
            transforms=(LoRA(rank=16),) if number == 1 else (),
            source=Preferences(pairs=PairsOf(step=compare.name), per_step=32),
            objective=DPO(beta=0.1),
            optimizer=AdamW(lr=2e-4),
            schedule=Constant(),
            fit=Fit(steps=8, checkpoint_every=4),
            minutes=3.0,
        )
        now = Trained(step=train.name)
        win = WinRate(
            name=f"win-{number}",
            subject=train.name,
            model=now,
            against=BASE,
            problems=UNSEEN,
            sampling=Sampling(max_tokens=LONGEST),
        )
        steps += [compare, train, followed(train.name, now), win]
    return Pipeline(name="iterate", steps=(*steps, Report()))
