"""One adapter for several tasks of unequal size, drawn at a temperature, each measured."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.tasks import Task, TaskMix
from treadle.models.source import Pretrained
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.train.run import Trained


def multi_task() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    tasks = tuple(
        Task(name=family.name, source=lessons(family).replace(per_step=8), examples=examples)
        for family, examples in zip(QUICKSTART, (1024, 256), strict=True)
    )
    run = sft(base).replace(source=TaskMix(tasks=tasks, draws=2, temperature=2.0))
    after = measured("sft", Trained(step="sft"))
    return Pipeline(name="multi-task", steps=(measured("base", base), run, after, Report()))
