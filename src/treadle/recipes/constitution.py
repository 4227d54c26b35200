"""A model revises its own answers by a constitution, and learns from what it made of them."""

from __future__ import annotations

from treadle.alignment.constitution import Revise
from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.iterate import PairsOf
from treadle.alignment.preferences import Preferences
from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def constitution() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    revise = Revise(
        name="revise",
        model=base,
        problems=FollowInstructions(),
        constitution="principles.yaml",
        minutes=2.0,
    )
    train = Run(
        name="train",
        model=base,
        transforms=(LoRA(rank=16),),
        source=Preferences(pairs=PairsOf(step="revise"), per_step=16),
        objective=DPO(beta=0.1, anchor=1.0),
        optimizer=AdamW(lr=2e-4),
        schedule=Cosine(),
        fit=Fit(steps=12),
        minutes=3.0,
    )
    again = revise.replace(name="measure", model=Trained(step="train"))
    return Pipeline(name="constitution", steps=(revise, train, again, Report()))
