"""A cross-encoder: two texts in, how well they belong together out; beside an embedding model."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.labelled import RatedTexts, TaskFiles
from treadle.data.task_formats import MatchFormat, RatedFormat
from treadle.evals.retrieval import Reranking
from treadle.models.heads import NumberHead
from treadle.models.source import Pretrained
from treadle.objectives.classify import Relevance
from treadle.optim.adamw import AdamW
from treadle.recipes.retrieval import HEAD, search
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def cross_encoder() -> Pipeline:
    base = Pretrained(name="all-minilm-l6-v2")
    pairs = TaskFiles(path="pairs.jsonl", format=RatedFormat(second="second"))
    task = Reranking(
        name="candidates", texts=TaskFiles(path="candidates.jsonl", format=MatchFormat())
    )
    train = Run(
        name="train",
        model=base,
        transforms=(NumberHead(),),
        source=RatedTexts(texts=pairs),
        objective=Relevance(),
        optimizer=AdamW(lr=1e-4),
        fit=Fit(steps=100),
        minutes=6.0,
    )
    before = search("measure", "embeddings", base, task, HEAD)
    after = search("measure-train", "train", Trained(step="train"), task)
    return Pipeline(name="cross-encoder", steps=(before, train, after, Report()))
