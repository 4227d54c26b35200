"""Classes of texts and of pairs of texts, beside what always saying the commonest one would get.

accuracy     right / n, with Wilson's interval
macro F1     mean over labels of 2 TP / (2 TP + FP + FN), resampled over texts
majority     accuracy of the commonest label of these texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from pydantic import Field

from treadle.core.results import Figure, accuracy
from treadle.data.labelled import TaskFiles
from treadle.data.records import Classified
from treadle.evals.reading import labels_of, reader_of
from treadle.evals.statistics import RESAMPLES
from treadle.evals.task import Benchmark, Done, Item, Record, Subject
from treadle.models.heads import label_number


@dataclass(frozen=True)
class ClassItem(Item):
    """A text or a pair of texts, and its label."""

    first: str
    second: str | None
    label: str | int


class TextClasses(Benchmark):
    """Which label does a text have?"""

    texts: TaskFiles
    """With ClassFormat."""
    longest: int = Field(256, ge=4)

    def items(self) -> Sequence[ClassItem]:
        found = self.texts.open(Classified)[: self.limit]
        return [ClassItem(i, "", e.first, e.second, e.label) for i, e in enumerate(found)]

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, ClassItem)]
        labels = labels_of(subject, self.name)
        golds = [label_number(item.label, labels) for item in asked]
        logits = reader_of(subject, self.longest).texts([(i.first, i.second) for i in asked])
        for item, gold, row in zip(asked, golds, logits.softmax(-1).tolist(), strict=True):
            said = int(np.argmax(row))
            output = {"said": labels[said], "gold": labels[gold], "probability": row[said]}
            done(item, Record(output, {"accuracy": float(said == gold)}))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return label_figures(
            [r.output["gold"] for r in records], [r.output["said"] for r in records]
        )


def label_figures(gold: Sequence[str], said: Sequence[str]) -> dict[str, Figure]:
    """Accuracy, macro F1 and the accuracy of the commonest label."""
    names = sorted({*gold, *said})
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for g, s in zip(gold, said, strict=True):
        counts[place[g], place[s]] += 1
    n = len(gold)
    generator = np.random.default_rng(0)
    shares = (counts / n).flatten()
    # One table at a time: a thousand of many labels would not fit into memory.
    drawn = (generator.multinomial(n, shares).reshape(counts.shape) for _ in range(RESAMPLES))
    low, high = np.quantile([macro_f1(table) for table in drawn], (0.025, 0.975))
    f1: Figure = {
        "value": macro_f1(counts),
        "low": float(low),
        "high": float(high),
        "n": n,
        "unit": "score",
    }
    commonest = names[int(counts.sum(1).argmax())]
    return {
        "accuracy": accuracy([float(g == s) for g, s in zip(gold, said, strict=True)]),
        "macro_f1": f1,
        "majority": accuracy([float(g == commonest) for g in gold]),
    }


def macro_f1(counts: Int[np.ndarray, "K K"]) -> float:
    """Of a confusion matrix, gold by rows; a label in neither rows nor columns does not count."""
    both = counts.sum(0) + counts.sum(1)
    there = both > 0
    return float((2 * np.diagonal(counts)[there] / both[there]).mean())
