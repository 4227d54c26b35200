"""A process reward model from rollouts, and what its choice among solutions is worth."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.roll_out import MeasureSteps, RollOut
from treadle.alignment.solutions import SolutionsOf, Steps
from treadle.core.pipeline import Pipeline
from treadle.models.reward_head import RewardHead
from treadle.models.source import Pretrained
from treadle.objectives.process_reward import ProcessReward
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.recipes.expert_iteration import expert_iteration
from treadle.recipes.families import QUICKSTART
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def process_reward() -> Pipeline:
    sft = expert_iteration().steps[0]
    label = RollOut(
        name="label",
        model=Trained(step="sft"),
        problems=ReasoningGym(families=QUICKSTART, seed=1),
        count=48,
        minutes=4.0,
    )
    held_out = label.replace(
        name="label-held-out",
        problems=ReasoningGym(families=QUICKSTART, split="heldout"),
        count=24,
        solutions=8,
    )
    train = Run(
        name="process-reward",
        model=Pretrained(name="smollm2-135m-instruct"),
        transforms=(LoRA(rank=16), RewardHead()),
        source=Steps(solutions=SolutionsOf(step="label"), per_step=16),
        objective=ProcessReward(),
        optimizer=AdamW(lr=5e-4),
        schedule=Cosine(),
        fit=Fit(steps=36, checkpoint_every=12),
        minutes=4.0,
    )
    measure = MeasureSteps(
        name="measure",
        model=Trained(step="process-reward"),
        subject="process-reward",
        solutions=SolutionsOf(step="label-held-out"),
    )
    steps = (sft, label, held_out, train, measure, Report())
    return Pipeline(name="process-reward", steps=steps)
