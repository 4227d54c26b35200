"""DPO with LoRA on pairs out of a file; how it ranks pairs that it never saw, before and after."""

from __future__ import annotations

from treadle.alignment.held_out import HeldOut
from treadle.alignment.measure import MeasurePreferences, SumOfLikelihoods
from treadle.alignment.preferences import PairFiles, Preferences
from treadle.core.pipeline import Pipeline
from treadle.data.split import LeakFreeSplit
from treadle.models.source import Pretrained
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def dpo() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    parts = LeakFreeSplit(validation=0.15, test=0)
    train = Run(
        name="dpo",
        model=base,
        transforms=(LoRA(rank=16),),
        source=Preferences(pairs=PairFiles(path="pairs.jsonl", parts=parts)),
        objective=DPO(beta=0.1),
        optimizer=AdamW(lr=2e-4),
        schedule=Cosine(),
        fit=Fit(steps=100),
        minutes=20.0,
    )
    before = MeasurePreferences(
        name="measure-base", model=base, subject="base", pairs=HeldOut(step="dpo"), minutes=2.0
    )
    after = before.replace(name="measure-dpo", model=Trained(step="dpo"), subject="dpo")
    implicit = after.replace(name="measure-reward", judge=SumOfLikelihoods(), against=base)
    return Pipeline(name="dpo", steps=(train, before, after, implicit, Report()))
