"""PPO on instructions that a program checks."""

from __future__ import annotations

from treadle.alignment.ppo import PPORollouts
from treadle.alignment.samplers import NativeKernels
from treadle.alignment.value_head import ValueHead
from treadle.core.pipeline import Pipeline
from treadle.objectives.ppo import PPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.lora import LoRA
from treadle.recipes.instructed import BASE, followed, rollouts
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def ppo() -> Pipeline:
    lots = rollouts().replace(sampler=NativeKernels())
    reinforce = Run(
        name="ppo",
        model=BASE,
        transforms=(LoRA(rank=16), ValueHead()),
        source=PPORollouts(rollouts=lots, epochs=1, minibatches=2),
        objective=PPO(),
        optimizer=AdamW(lr=3e-4),
        schedule=Constant(),
        fit=Fit(steps=48, checkpoint_every=8),
        minutes=6.0,
    )
    before, after = followed("base", BASE), followed("ppo", Trained(step="ppo"))
    return Pipeline(name="ppo", steps=(before, reinforce, after, Report()))
