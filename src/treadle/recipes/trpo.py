"""TRPO on instructions that a program checks."""

from __future__ import annotations

from treadle.alignment.trust_region import TRPO
from treadle.core.pipeline import Pipeline
from treadle.peft.lora import LoRA
from treadle.recipes.instructed import BASE, followed, rollouts
from treadle.reports.report import Report
from treadle.train.run import Trained


def trpo() -> Pipeline:
    reinforce = TRPO(
        model=BASE,
        transforms=(LoRA(rank=16),),
        source=rollouts().replace(prompts=4),
        steps=16,
        iterations=5,
        checkpoint_every=4,
        minutes=20.0,
    )
    before, after = followed("base", BASE), followed("trpo", Trained(step="trpo"))
    return Pipeline(name="trpo", steps=(before, reinforce, after, Report()))
