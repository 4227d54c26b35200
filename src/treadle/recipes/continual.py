"""Two tasks learned one after the other, four ways: naive, EWC, replay, and without forgetting."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.replay import Replayed
from treadle.data.supervised import Supervised
from treadle.distillation.lwf import without_forgetting
from treadle.evals.forgetting import ForgettingScore, Stage
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.objectives.ewc import EWC
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fisher import Fisher, Remembered
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def continual() -> Pipeline:
    old, new = QUICKSTART
    begin = sft(Pretrained(name="smollm2-135m-instruct"))
    first = begin.replace(name="first", source=lessons(old), fit=Fit(steps=48))
    done = Trained(step="first")
    naive = begin.replace(
        name="naive", model=done, transforms=(), source=lessons(new), fit=Fit(steps=32)
    )
    both = Replayed(new=lessons(new).conversations, old=(lessons(old).conversations,))
    unforgetting = without_forgetting(lessons(new), done)
    ways: tuple[Run, ...] = (
        naive,
        naive.replace(
            name="ewc",
            model=Remembered(model=done, step="fisher"),
            objective=EWC(objective=CausalLM()),
        ),
        naive.replace(name="replay", source=Supervised(conversations=both, per_step=16)),
        naive.replace(
            name="lwf", source=unforgetting.source, objective=unforgetting.objective, minutes=5.0
        ),
    )
    fisher = Fisher(model=done, source=lessons(old))
    stage = Stage(step="measure-first", task=old.name)
    after = (
        step
        for run in ways
        for step in (
            run,
            measured(run.name, Trained(step=run.name)),
            ForgettingScore(
                name=f"forgetting-{run.name}",
                stages=(stage, Stage(step=f"measure-{run.name}", task=new.name)),
            ),
        )
    )
    start = (first, measured("first", done), fisher)
    return Pipeline(name="continual", steps=(*start, *after, SideBySide(), Report()))
