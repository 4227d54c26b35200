"""Retrieval: of a corpus, which texts belong to a query?

    recall@k    share of the relevant texts among the first k
    nDCG@10     sum_i rel_i / log2(i + 1)  over the first 10, divided by that of the best order
    MRR@10      1 / rank of the first relevant text, 0 beyond 10

An embedding model ranks the corpus by cosine. A cross-encoder ranks what is put before it:
`Reranking`, where an embedding model can be measured too.
Jarvelin and Kekalainen 2002; Thakur et al. 2021, BEIR, arXiv:2104.08663.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.results import Figure
from treadle.data.fields import text
from treadle.data.labelled import TaskFiles
from treadle.data.read import read_rows
from treadle.data.records import Matched
from treadle.evals.reading import gives_vectors, reader_of
from treadle.evals.rows import Row
from treadle.evals.task import Benchmark, Done, Item, Record, Subject, shares
from treadle.inference.reader import unit
from treadle.objectives.classify import one_number

CARD = Card(
    id="ft.embedding.retrieval",
    paper="Thakur et al. 2021, BEIR, arXiv:2104.08663; Jarvelin and Kekalainen 2002",
    summary="Measures retrieval: nDCG, recall and MRR over a corpus, or over given candidates.",
    recipe="treadle run retrieval steps.measure.benchmarks.0.corpus=corpus.jsonl "
    "steps.measure.benchmarks.0.queries=queries.jsonl",
    oracle="tests/evals/test_evals_retrieval.py::test_metrics_match_sentence_transformers",
)

RECALLS = (1, 10, 100)
CUT = 10


@dataclass(frozen=True)
class QueryItem(Item):
    """A query and the ids of the texts that belong to it."""

    text: str
    relevant: tuple[str, ...]


class Retrieval(Benchmark):
    """Which texts of a corpus belong to a query?"""

    corpus: str
    """File or folder of the texts; see `data/read.py`."""
    id: str = "id"
    """Key of a text's id."""
    keys: tuple[str, ...] = ("title", "text")
    """Keys of what is embedded, joined by spaces; those that a row lacks are left out."""
    queries: str
    query: str = "query"
    relevant: str = "relevant"
    """Key of the ids of what belongs to a query; queries without any are left out."""
    longest: int = Field(256, ge=4)

    def items(self) -> Sequence[QueryItem]:
        found = []
        for index, row in enumerate(read_rows(self.queries)):
            ids = row.get(self.relevant)
            if not isinstance(ids, list):
                raise FileFormatError(
                    f"{self.queries}: row {index}: key `{self.relevant}`: expected a list of ids"
                )
            if ids:
                relevant = tuple(dict.fromkeys(map(str, ids)))
                found.append(QueryItem(index, "", text(row, self.query), relevant))
        return found[: self.limit]

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, QueryItem)]
        if not asked:
            return
        if not gives_vectors(subject):
            raise TreadleError(
                f"task `{self.name}`: the model gives no vectors; measure it by Reranking, or add "
                "an EmbeddingHead"
            )
        ids, texts = self._corpus()
        lost = {i for item in asked for i in item.relevant} - set(ids)
        if lost:
            raise FileFormatError(f"{self.corpus}: has no text `{min(lost)}`, which a query names")
        reader = reader_of(subject, self.longest)
        vectors = unit(reader.texts([(t, None) for t in texts]))
        queries = unit(reader.texts([(item.text, None) for item in asked]))
        for item, query in zip(asked, queries, strict=True):
            order = torch.argsort(vectors @ query, descending=True, stable=True)[: max(RECALLS)]
            ranked = [ids[i] for i in order.tolist()]
            done(item, Record({"found": ranked[:CUT]}, ranking_metrics(ranked, item.relevant)))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return shares(records)

    def _corpus(self) -> tuple[list[str], list[str]]:
        rows = list(read_rows(self.corpus))
        ids, texts = [], []
        for index, row in enumerate(rows):
            if row.get(self.id) is None:
                raise FileFormatError(f"{self.corpus}: row {index}: key `{self.id}` is missing")
            ids.append(str(row[self.id]))
            texts.append(_joined(row, self.keys, f"{self.corpus}: row {index}"))
        if len(set(ids)) < len(ids):
            twice = next(name for name, times in Counter(ids).items() if times > 1)
            raise FileFormatError(
                f"{self.corpus}: two texts have the id `{twice}`; give one another"
            )
        return ids, texts


class Reranking(Benchmark):
    """Which of a few texts belongs to a query? Rows of MatchFormat with negatives."""

    texts: TaskFiles
    longest: int = Field(256, ge=4)

    def items(self) -> Sequence[RerankItem]:
        found = []
        for index, example in enumerate(self.texts.open(Matched)[: self.limit]):
            if not example.negatives:
                raise FileFormatError(f"{self.texts.path}: example {index} has no negatives")
            found.append(
                RerankItem(index, "", example.query, (example.positive, *example.negatives))
            )
        return found

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, RerankItem)]
        reader = reader_of(subject, self.longest)
        pairs = [(item.text, c) for item in asked for c in item.candidates]
        if gives_vectors(subject):
            texts = list(dict.fromkeys(t for pair in pairs for t in pair))
            rows = dict(zip(texts, unit(reader.texts([(t, None) for t in texts])), strict=True))
            scores = [float(rows[a] @ rows[b]) for a, b in pairs]
        else:
            scores = one_number(reader.texts(pairs)).tolist()
        start = 0
        for item in asked:
            mine = scores[start : start + len(item.candidates)]
            start += len(mine)
            # an equal score counts as a mistake
            rank = 1 + sum(score >= mine[0] for score in mine[1:])
            metrics = {
                "accuracy": float(rank == 1),
                "mrr": 1 / rank,
                "chance": 1 / len(mine),
            }
            done(item, Record({"scores": mine}, metrics))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return shares(records)


@dataclass(frozen=True)
class RerankItem(Item):
    """A query and its candidates, of which the first belongs to it."""

    text: str
    candidates: tuple[str, ...]


def ranking_metrics(ranked: Sequence[str], relevant: Collection[str]) -> dict[str, float]:
    """Of the ids in the order in which they were ranked."""
    hits = [place for place, name in enumerate(ranked, 1) if name in relevant]
    gain = sum(1 / math.log2(place + 1) for place in hits if place <= CUT)
    best = sum(1 / math.log2(place + 1) for place in range(1, min(CUT, len(relevant)) + 1))
    recalls = {f"recall@{k}": sum(p <= k for p in hits) / len(relevant) for k in RECALLS}
    first = hits[0] if hits and hits[0] <= CUT else None
    return {f"ndcg@{CUT}": gain / best, f"mrr@{CUT}": 1 / first if first else 0.0, **recalls}


def _joined(row: Row, keys: Sequence[str], where: str) -> str:
    parts = [str(row[key]) for key in keys if row.get(key)]
    if not parts:
        raise FileFormatError(f"{where}: none of the keys {', '.join(keys)} holds a text")
    return " ".join(parts)
