"""Labels for words, such as names of persons and places, by a small encoder."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.labelled import TaggedTexts, TaskFiles
from treadle.data.task_formats import TagFormat
from treadle.evals.evaluate import Evaluate
from treadle.evals.spans import WordLabels
from treadle.models.heads import TokenHead
from treadle.models.source import Pretrained
from treadle.objectives.classify import Classify
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def ner() -> Pipeline:
    texts = TaskFiles(path="words.jsonl", format=TagFormat())
    kinds = ("person", "location", "corporation", "group", "product", "creative-work")
    labels = ("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))
    train = Run(
        name="train",
        model=Pretrained(name="all-minilm-l6-v2"),
        transforms=(TokenHead(labels=labels),),
        source=TaggedTexts(texts=texts, longest=128),
        objective=Classify(),
        optimizer=AdamW(lr=3e-4),
        fit=Fit(steps=300),
        minutes=4.0,
    )
    measure = Evaluate(
        name="measure",
        subject="train",
        model=Trained(step="train"),
        benchmarks=(WordLabels(name="spans", texts=texts.replace(held_out=True)),),
    )
    return Pipeline(name="ner", steps=(train, measure, Report()))
