"""Labels for texts or pairs of texts (NLI), by a small encoder, held beside the majority label."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.labelled import ClassTexts, TaskFiles
from treadle.data.task_formats import ClassFormat
from treadle.evals.classes import TextClasses
from treadle.evals.evaluate import Evaluate
from treadle.models.heads import ClassHead
from treadle.models.source import Pretrained
from treadle.objectives.classify import Classify
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def classify() -> Pipeline:
    texts = TaskFiles(path="texts.jsonl", format=ClassFormat())
    train = Run(
        name="train",
        model=Pretrained(name="all-minilm-l6-v2"),
        transforms=(ClassHead(labels=("no", "yes")),),
        source=ClassTexts(texts=texts, longest=128),
        objective=Classify(),
        optimizer=AdamW(lr=1e-4),
        fit=Fit(steps=200),
        minutes=4.0,
    )
    measure = Evaluate(
        name="measure",
        subject="train",
        model=Trained(step="train"),
        benchmarks=(TextClasses(name="classes", texts=texts.replace(held_out=True), longest=128),),
    )
    return Pipeline(name="classify", steps=(train, measure, Report()))
