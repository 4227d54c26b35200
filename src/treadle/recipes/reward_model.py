"""A reward model from preference pairs, and how often it agrees with pairs that it never saw."""

from __future__ import annotations

from treadle.alignment.held_out import HeldOut
from treadle.alignment.measure import MeasurePreferences, ScoreOf
from treadle.alignment.preferences import PairFiles, Preferences
from treadle.alignment.reference import NoReference
from treadle.core.pipeline import Pipeline
from treadle.data.split import LeakFreeSplit
from treadle.models.reward_head import RewardHead
from treadle.models.source import Pretrained
from treadle.objectives.reward import BradleyTerry
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def reward_model() -> Pipeline:
    pairs = PairFiles(path="pairs.jsonl", parts=LeakFreeSplit(validation=0.15, test=0))
    train = Run(
        name="reward",
        model=Pretrained(name="smollm2-135m-instruct"),
        transforms=(LoRA(rank=16), RewardHead()),
        source=Preferences(pairs=pairs, per_step=16, longest=320, reference=NoReference()),
        objective=BradleyTerry(centre=0.01),
        optimizer=AdamW(lr=3e-4),
        schedule=Cosine(),
        fit=Fit(steps=60, checkpoint_every=15),
        minutes=12.0,
    )
    measure = MeasurePreferences(
        name="measure-reward",
        subject="reward",
        model=Trained(step="reward"),
        pairs=HeldOut(step="reward"),
        judge=ScoreOf(),
        minutes=2.0,
    )
    return Pipeline(name="reward-model", steps=(train, measure, Report()))
