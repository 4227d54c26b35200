"""Preferences instead of solutions: DPO with LoRA on pairs out of a file."""

from __future__ import annotations

from treadle.alignment.preferences import PairFiles, Preferences
from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run


def dpo() -> Pipeline:
    train = Run(
        name="dpo",
        model=Pretrained(name="smollm2-135m-instruct"),
        transforms=(LoRA(rank=16),),
        source=Preferences(pairs=PairFiles(path="pairs.jsonl")),
        objective=DPO(beta=0.1),
        optimizer=AdamW(lr=2e-4),
        schedule=Cosine(),
        fit=Fit(steps=100),
    )
    return Pipeline(name="dpo", steps=(train, Report()))
