"""Numbers for texts and for pairs of texts: do they order as the true ones do?

spearman    correlation of the ranks, equal values sharing the mean of theirs
pearson     correlation of the numbers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.results import Figure
from treadle.data.labelled import TaskFiles
from treadle.data.records import Rated
from treadle.evals.reading import gives_vectors, reader_of
from treadle.evals.statistics import RESAMPLES
from treadle.evals.task import Benchmark, Done, Item, Record, Subject
from treadle.objectives.classify import one_number

Numbers = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class GradeItem(Item):
    """A text or a pair of texts, and its number."""

    first: str
    second: str | None
    value: float


class Grades(Benchmark):
    """Which number does a text or a pair have? Of an embedding model, the cosine of the pair."""

    texts: TaskFiles
    """With RatedFormat."""
    longest: int = Field(256, ge=4)

    def items(self) -> Sequence[GradeItem]:
        found = self.texts.open(Rated)[: self.limit]
        return [GradeItem(i, "", e.first, e.second, e.value) for i, e in enumerate(found)]

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, GradeItem)]
        reader = reader_of(subject, self.longest)
        if gives_vectors(subject):
            pairs = [i.second for i in asked if i.second is not None]
            if len(pairs) < len(asked):
                raise TreadleError(f"task `{self.name}`: an embedding model rates pairs of texts")
            first = reader.texts([(i.first, None) for i in asked])
            second = reader.texts([(text, None) for text in pairs])
            scores = torch.cosine_similarity(first, second)
        else:
            scores = one_number(reader.texts([(i.first, i.second) for i in asked]))
        for item, score in zip(asked, scores.tolist(), strict=True):
            done(item, Record({"gold": item.value, "said": score}, {}))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        said = np.array([r.output["said"] for r in records], dtype=np.float64)
        gold = np.array([r.output["gold"] for r in records], dtype=np.float64)
        return {
            "spearman": resampled(spearman, said, gold),
            "pearson": resampled(pearson, said, gold),
        }


def resampled(measure: Callable[[Numbers, Numbers], float], a: Numbers, b: Numbers) -> Figure:
    """A measure of pairs, with percentiles over those resampled ones that have it."""
    generator, n = np.random.default_rng(0), len(a)
    draws = (generator.integers(0, n, n) for _ in range(RESAMPLES))
    found = [x for d in draws if not np.isnan(x := measure(a[d], b[d]))]
    low, high = map(float, np.quantile(found, (0.025, 0.975))) if found else (None, None)
    return {"value": measure(a, b), "low": low, "high": high, "n": n, "unit": "score"}


def spearman(a: Numbers, b: Numbers) -> float:
    return pearson(ranks(a), ranks(b))


def pearson(a: Numbers, b: Numbers) -> float:
    """Not a number where one of them never changes."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def ranks(values: Numbers) -> Numbers:
    """From 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
