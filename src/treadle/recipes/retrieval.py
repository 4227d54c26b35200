"""How well an embedding model finds the texts of a corpus that belong to a query."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.evals.evaluate import Evaluate
from treadle.evals.retrieval import Retrieval
from treadle.evals.task import Benchmark
from treadle.models.heads import EmbeddingHead
from treadle.models.source import ModelSource, Pretrained
from treadle.models.transform import Transform
from treadle.reports.report import Report

HEAD = EmbeddingHead()


def retrieval() -> Pipeline:
    task = Retrieval(name="search", corpus="corpus.jsonl", queries="queries.jsonl")
    step = search("measure", "base", Pretrained(name="all-minilm-l6-v2"), task, HEAD)
    return Pipeline(name="retrieval", steps=(step, Report()))


def search(
    name: str, subject: str, model: ModelSource, task: Benchmark, *transforms: Transform
) -> Evaluate:
    """A measurement of an embedding model or a cross-encoder."""
    return Evaluate(
        name=name,
        subject=subject,
        model=model,
        transforms=transforms,
        benchmarks=(task,),
        minutes=2.0,
    )
