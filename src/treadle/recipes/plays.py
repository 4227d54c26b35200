"""What recipes of play share: a model is schooled on worked plays, then plays for reward itself."""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.played import Played
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Conversations, Supervised
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.quickstart import sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

BASE = Pretrained(name="smollm2-135m-instruct")


def schooled(plays: Conversations, steps: int) -> Run:
    """The first lessons, from plays that a program has written."""
    return sft(BASE).replace(
        source=Supervised(conversations=plays, per_step=8),
        fit=Fit(steps=steps, checkpoint_every=4),
        minutes=2.0,
    )


def reinforced(name: str, source: Played, steps: int, minutes: float) -> Run:
    """Plays of its own."""
    return Run(
        name=name,
        model=Trained(step="sft"),
        source=source,
        objective=GRPO(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=steps, checkpoint_every=2),
        minutes=minutes,
    )


def watched(name: str, school: Run, play: Run, exam: MeasurePlayed) -> Pipeline:
    """The exam of the base is taken again after each of the two."""

    def after(step: str, model: ModelSource) -> MeasurePlayed:
        return exam.replace(name=f"measure-{step}", subject=step, model=model)

    return Pipeline(
        name=name,
        steps=(
            exam,
            school,
            after(school.name, Trained(step=school.name)),
            play,
            after(play.name, Trained(step=play.name)),
            Report(),
        ),
    )
