"""Eight ways to fine-tune one model on one task with equal data, measured side by side.

Each method trains in a process of its own, so that its peak memory is its own; then all answer the
same held-out problems. The report's table has quality with intervals, trained parameters, memory,
time and size: the field's decision table, measured instead of quoted.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.core.processes import ProcessPerStep
from treadle.evals.answers import Answers
from treadle.evals.evaluate import Evaluate
from treadle.models.source import ModelSource, Pretrained
from treadle.planning.methods import methods
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured, sft
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.run import Trained

BASE = Pretrained(name="smollm2-135m-instruct")
HELD_OUT = WorkedSolutions(problems=ReasoningGym(families=QUICKSTART, split="heldout"), amount=64)
STEPS = 20


def compare_finetuning() -> Pipeline:
    runs = tuple(
        sft(BASE).replace(
            name=method.name,
            transforms=method.transforms,
            optimizer=method.optimizer,
            fit=Fit(steps=STEPS, checkpoint_every=STEPS),
            minutes=1.5,
        )
        for method in methods()
        if not method.distils
    )
    stages = (stage for run in runs for stage in (run, examined(run.name, Trained(step=run.name))))
    return Pipeline(
        name="compare-finetuning",
        steps=(examined("base", BASE), *stages, SideBySide(), Report()),
        processes=ProcessPerStep(),
    )


def examined(subject: str, model: ModelSource) -> Evaluate:
    """The quickstart's exams, half as long, and how well held-out solutions are foretold."""
    whole = measured(subject, model)
    return whole.replace(
        exams=tuple(exam.replace(count=24) for exam in whole.exams),
        readings=tuple(reading.replace(tokens=4_000) for reading in whole.readings),
        benchmarks=(Answers(conversations=HELD_OUT, limit=64),),
    )
