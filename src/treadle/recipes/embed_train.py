"""An embedding model from texts that belong together, measured before and after."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.labelled import TaskFiles
from treadle.data.matches import Matches
from treadle.data.task_formats import MatchFormat
from treadle.evals.retrieval import Retrieval
from treadle.models.source import Pretrained
from treadle.objectives.embed import Embed
from treadle.optim.adamw import AdamW
from treadle.recipes.retrieval import HEAD, search
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def embed_train() -> Pipeline:
    base = Pretrained(name="all-minilm-l6-v2")
    task = Retrieval(name="search", corpus="corpus.jsonl", queries="queries.jsonl")
    train = Run(
        name="train",
        model=base,
        transforms=(HEAD,),
        source=Matches(
            texts=TaskFiles(path="pairs.jsonl", format=MatchFormat()), per_step=48, longest=128
        ),
        objective=Embed(),
        optimizer=AdamW(lr=3e-5),
        fit=Fit(steps=60),
        minutes=6.0,
    )
    after = search("measure-train", "train", Trained(step="train"), task)
    before = search("measure", "base", base, task, HEAD)
    return Pipeline(name="embed-train", steps=(before, train, after, Report()))
