"""A mixture of reward models from pairs of two kinds, and how it does on unseen pairs of each."""

from __future__ import annotations

from treadle.alignment.aspects import Aspect, AspectPreferences, MixtureOf
from treadle.alignment.held_out import HeldOut
from treadle.alignment.measure import MeasurePreferences
from treadle.alignment.preferences import PairFiles
from treadle.core.pipeline import Pipeline
from treadle.data.split import LeakFreeSplit
from treadle.models.source import Pretrained
from treadle.objectives.reward_mixture import MixtureBradleyTerry, MixtureHead
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def reward_mixture() -> Pipeline:
    parts = LeakFreeSplit(validation=0.15, test=0)
    kinds = [PairFiles(path=p, parts=parts) for p in ("harmless.jsonl", "helpful.jsonl")]
    names = ("harmless", "helpful")
    aspects = tuple(Aspect(name=n, pairs=k) for n, k in zip(names, kinds, strict=True))
    train = Run(
        name="mixture",
        model=Pretrained(name="smollm2-135m-instruct"),
        transforms=(LoRA(rank=16), MixtureHead(aspects=2)),
        source=AspectPreferences(aspects=aspects, longest=320),
        objective=MixtureBradleyTerry(centre=0.01),
        optimizer=AdamW(lr=3e-4),
        schedule=Cosine(),
        fit=Fit(steps=60, checkpoint_every=15),
        minutes=12.0,
    )
    measures = tuple(
        MeasurePreferences(
            name=f"measure-{name}",
            subject="mixture",
            model=Trained(step="mixture"),
            pairs=HeldOut(step="mixture", aspect=name),
            judge=MixtureOf(),
            minutes=2.0,
        )
        for name in names
    )
    return Pipeline(name="reward-mixture", steps=(train, *measures, Report()))
