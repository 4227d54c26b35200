"""One model bargains with itself: schooled on scripted deals, then self-play for the payoff."""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.negotiation import Negotiation, ScriptedDeals
from treadle.alignment.played import Played
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Supervised
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.quickstart import sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

BASE = Pretrained(name="smollm2-135m-instruct")


def negotiate() -> Pipeline:
    game = Negotiation()
    school = sft(BASE).replace(
        source=Supervised(conversations=ScriptedDeals(negotiation=game), per_step=8),
        fit=Fit(steps=16, checkpoint_every=4),
        minutes=2.0,
    )
    source = Played(
        environment=game.replace(seed=1),
        sampling=Sampling(max_tokens=24),
        turns=game.offers,
        tokens=2048,
        sampler=NativeKernels(),
    )
    play = Run(
        name="self-play",
        model=Trained(step="sft"),
        source=source,
        objective=GRPO(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=16, checkpoint_every=2),
        minutes=6.0,
    )
    return Pipeline(
        name="negotiate",
        steps=(
            watched("base", BASE, source),
            school,
            watched("sft", Trained(step="sft"), source),
            play,
            watched("self-play", Trained(step="self-play"), source),
            Report(),
        ),
    )


def watched(subject: str, model: ModelSource, source: Played) -> MeasurePlayed:
    """Held-out deals between two seats of the same model."""
    return MeasurePlayed(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        played=source.replace(environment=Negotiation(held_out=True)),
        what="payoff",
        count=96,
    )
