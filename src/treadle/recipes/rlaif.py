"""Preferences from a model: do its verdicts agree with people, and what is learned by them?"""

from __future__ import annotations

from treadle.alignment.agreement import Agreement
from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.iterate import Compare, PairsOf, WinRate
from treadle.alignment.judge import ByJudge
from treadle.alignment.preferences import PairFiles, Preferences
from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def rlaif() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    agreement = Agreement(
        name="agreement",
        labeller=ByJudge(),
        subject="judge",
        pairs=PairFiles(path="pairs.jsonl"),
        minutes=2.0,
    )
    label = Compare(
        name="label", model=base, problems=FollowInstructions(), labeller=ByJudge(), minutes=3.0
    )
    train = Run(
        name="rlaif",
        model=base,
        transforms=(LoRA(rank=16),),
        source=Preferences(pairs=PairsOf(step="label"), per_step=16),
        objective=DPO(beta=0.1),
        optimizer=AdamW(lr=2e-4),
        schedule=Cosine(),
        fit=Fit(steps=12),
        minutes=3.0,
    )
    win = WinRate(
        name="win-rate",
        subject="rlaif",
        model=Trained(step="rlaif"),
        against=base,
        problems=FollowInstructions(held_out=True),
        labeller=ByJudge(),
        minutes=2.0,
    )
    return Pipeline(name="rlaif", steps=(agreement, label, train, win, Report()))
