"""Spans that word labels mark, such as names: F1 of whole spans, as CoNLL counts them.

A span is right if its type, its first and its last word are. B- begins one, and so does an I- that
does not go on with the type before it (Tjong Kim Sang and De Meulder 2003, conlleval). Labels of
one kind need no type: B, I, O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.results import Figure
from treadle.data.labelled import TaskFiles
from treadle.data.records import Tagged
from treadle.evals.reading import labels_of, reader_of
from treadle.evals.statistics import ratio
from treadle.evals.task import Benchmark, Done, Item, Record, Subject
from treadle.models.heads import label_number

OUTSIDE, BEGIN, INSIDE = "O", "B", "I"


@dataclass(frozen=True)
class Span:
    """Words `start` to `end`, the last not among them."""

    type: str
    start: int
    end: int


def spans_of(tags: Sequence[str]) -> set[Span]:
    """The spans of BIO tags."""
    found: set[Span] = set()
    start, open_ = 0, OUTSIDE
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, _, kind = tag.partition("-")
        if open_ != OUTSIDE and mark == INSIDE and kind == type_of(open_):
            continue
        if open_ != OUTSIDE:
            found.add(Span(type_of(open_), start, i))
        start, open_ = i, tag
    return found


def type_of(tag: str) -> str:
    """`person` of `B-person`; nothing where labels have no type."""
    return tag.partition("-")[2]


@dataclass(frozen=True)
class TagItem(Item):
    """Words and their labels."""

    words: tuple[str, ...]
    tags: tuple[str | int, ...]


class WordLabels(Benchmark):
    """Which spans do the labels of words mark?"""

    texts: TaskFiles
    """With TagFormat."""
    longest: int = Field(256, ge=4)
    """Words beyond so many tokens are outside of all spans."""

    def items(self) -> Sequence[TagItem]:
        found = self.texts.open(Tagged)[: self.limit]
        return [TagItem(i, "", e.words, e.tags) for i, e in enumerate(found)]

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, TagItem)]
        labels = labels_of(subject, self.name)
        if OUTSIDE not in labels:
            raise TreadleError(
                f"task `{self.name}`: none of the labels {', '.join(labels)} is `{OUTSIDE}`, for "
                "words outside of all spans"
            )
        if strange := [x for x in labels if x.partition("-")[0] not in (BEGIN, INSIDE, OUTSIDE)]:
            raise TreadleError(
                f"task `{self.name}`: the label `{strange[0]}` is not of the scheme B- I- O; "
                "spans of another scheme would be counted wrong: train with labels of this one"
            )
        golds = [[labels[label_number(t, labels)] for t in item.tags] for item in asked]
        rows = reader_of(subject, self.longest).words([item.words for item in asked])
        for item, gold, logits in zip(asked, golds, rows, strict=True):
            said = [labels[i] for i in logits.argmax(-1).tolist()]
            said += [OUTSIDE] * (len(gold) - len(said))
            ours, theirs = spans_of(said), spans_of(gold)
            metrics = {
                "right": len(ours & theirs),
                "said": len(ours),
                "gold": len(theirs),
                "words_right": sum(a == b for a, b in zip(said, gold, strict=True)),
                "words": len(gold),
                "words_outside": gold.count(OUTSIDE),
            }
            done(
                item,
                Record({"said": said, "gold": gold}, {k: float(v) for k, v in metrics.items()}),
            )

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return span_figures([r.metrics for r in records])


def span_figures(counts: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """F1, precision and recall of spans, accuracy of words and of calling none a name."""

    def share(top: Sequence[float], bottom: Sequence[float]) -> Figure:
        if not sum(bottom):
            return {"value": 0.0, "low": None, "high": None, "n": len(bottom), "unit": "score"}
        return ratio(top, bottom, lambda x: x, "score")

    right, said, gold, words = ([c[k] for c in counts] for k in ("right", "said", "gold", "words"))
    both = [s + g for s, g in zip(said, gold, strict=True)]
    return {
        "f1": share([2 * r for r in right], both),
        "precision": share(right, said),
        "recall": share(right, gold),
        "word_accuracy": share([c["words_right"] for c in counts], words),
        "all_outside": share([c["words_outside"] for c in counts], words),
    }
