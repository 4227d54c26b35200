"""The same fine-tuning twice with one budget: in random order, and from easy to hard."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.curriculum import Curriculum, ModelLoss, RootPace
from treadle.models.source import Pretrained
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.run import Trained


def curriculum() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    shuffled = sft(base).replace(name="shuffled", fit=Fit(steps=32), minutes=2.0)
    ordered = Curriculum(
        source=lessons(*QUICKSTART), pacing=RootPace(steps=20), difficulty=ModelLoss()
    )
    paced = shuffled.replace(name="easy-first", source=ordered, minutes=3.0)
    steps = (
        step
        for run in (shuffled, paced)
        for step in (run, measured(run.name, Trained(step=run.name)))
    )
    return Pipeline(name="curriculum", steps=(*steps, SideBySide(), Report()))
