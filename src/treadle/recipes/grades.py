"""A number for texts, or for pairs of texts such as their similarity, held beside the true ones."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.labelled import RatedTexts, TaskFiles
from treadle.data.task_formats import RatedFormat
from treadle.evals.evaluate import Evaluate
from treadle.evals.grades import Grades
from treadle.models.heads import NumberHead
from treadle.models.source import Pretrained
from treadle.objectives.classify import SquaredError
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def grades() -> Pipeline:
    texts = TaskFiles(path="grades.jsonl", format=RatedFormat())
    train = Run(
        name="train",
        model=Pretrained(name="all-minilm-l6-v2"),
        transforms=(NumberHead(),),
        source=RatedTexts(texts=texts, longest=128),
        objective=SquaredError(),
        optimizer=AdamW(lr=1e-4),
        fit=Fit(steps=200),
        minutes=4.0,
    )
    measure = Evaluate(
        name="measure",
        subject="train",
        model=Trained(step="train"),
        benchmarks=(Grades(name="grades", texts=texts.replace(held_out=True), longest=128),),
    )
    return Pipeline(name="grades", steps=(train, measure, Report()))
