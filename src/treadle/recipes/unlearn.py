"""A model that learned two tasks forgets one of them by NPO, and keeps the other."""

from __future__ import annotations

from treadle.alignment.unlearning import Unlearning
from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.objectives.unlearn import Unlearn
from treadle.optim.adamw import AdamW
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Trained


def unlearn() -> Pipeline:
    gone, kept = (lessons(family).conversations for family in QUICKSTART)
    learned = sft(Pretrained(name="smollm2-135m-instruct"))
    forgetting = learned.replace(
        name="unlearn",
        model=Trained(step="sft"),
        transforms=(),
        source=Unlearning(forget=gone, retain=kept),
        objective=Unlearn(),
        optimizer=AdamW(lr=5e-4),
        fit=Fit(steps=24),
    )
    steps = (
        step
        for run in (learned, forgetting)
        for step in (run, measured(run.name, Trained(step=run.name)))
    )
    return Pipeline(name="unlearn", steps=(*steps, Report()))
