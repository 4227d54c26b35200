"""Train, validation and test, so that nothing in one is nearly in another.

Documents are sets of word n-grams (shingles; Broder 1997). Those whose sets are alike,
|A n B| / |A u B| >= similarity, form clusters, and a cluster goes to one part as a whole, by the
smallest hash of its documents. So the same documents always fall the same way, whatever their
order, and a new document moves nothing but near duplicates of itself.

All pairs that are alike are found, none by chance: if two sets are alike, the rarest
|A| - ceil(similarity * |A|) + 1 shingles of each have one in common (prefix filter).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Self

import numpy as np
from jaxtyping import UInt64
from pydantic import Field, model_validator

from treadle.core.cards import Card
from treadle.core.config import Config

CARD = Card(
    id="data.split",
    paper="Broder 1997 (shingles); Chaudhuri et al. 2006, Bayardo et al. 2007 (prefix filter)",
    summary="Splits by content hash, stable, with near duplicates kept on one side.",
    recipe="treadle run quickstart-scratch "
    "steps.1.source.documents='{kind: TextFiles, path: corpus.txt}'",
    oracle="tests/data/test_data_split.py::test_no_cluster_in_two_parts",
)

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")  # scripts without spaces: each sign is a word

Shingles = UInt64[np.ndarray, " S"]


class Part(StrEnum):
    """Where a document goes."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class LeakFreeSplit(Config):
    """How much is held out, and how alike two documents may be across parts."""

    validation: float = Field(0.01, ge=0, lt=1)
    test: float = Field(0.01, ge=0, lt=1)
    similarity: float = Field(0.7, gt=0, le=1)
    """Jaccard similarity of shingles from which documents stay together."""
    shingle: int = Field(5, ge=1)
    """Words in a shingle."""
    salt: str = ""
    """Another salt, another split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test is {self.validation + self.test}: nothing is left")
        return self

    def __call__(self, texts: Iterable[str]) -> list[Part]:
        """The part of each text, in order. Holds their shingles in memory, not the texts."""
        shingles: list[Shingles] = []
        hashes: list[int] = []
        for text in texts:
            shingles.append(shingles_of(text, self.shingle))
            hashes.append(_hash(text, self.salt))
        clusters = clusters_of(shingles, self.similarity)
        smallest: dict[int, int] = {}
        for cluster, value in zip(clusters, hashes, strict=True):
            smallest[cluster] = min(value, smallest.get(cluster, value))
        return [self._part(smallest[cluster]) for cluster in clusters]

    def _part(self, value: int) -> Part:
        place = value / 2**64
        if place < self.test:
            return Part.TEST
        return Part.VALIDATION if place < self.test + self.validation else Part.TRAIN


def shingles_of(text: str, size: int) -> Shingles:
    """Hashes of all runs of `size` words, sorted, each once; of all words if they are fewer."""
    words = _WORD.findall(text.casefold()) or [text.strip()]
    values = np.array([_word(word) for word in words], dtype=np.uint64)
    size = min(size, len(values))
    runs = np.zeros(len(values) - size + 1, dtype=np.uint64)
    for i in range(size):  # a polynomial modulo 2^64
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + values[i : i + len(runs)]
    return np.unique(runs)


def clusters_of(sets: Sequence[Shingles], similarity: float) -> list[int]:
    """For each set the index of its cluster's first; alike sets are in one, and what is
    alike to them."""
    forest = _Forest(len(sets))
    if not sets:
        return []
    ranks = _by_rarity(sets)
    posting: dict[int, dict[int, list[int]]] = {}  # shingle -> cluster -> documents
    for document in sorted(range(len(sets)), key=lambda d: len(ranks[d])):
        ranked = ranks[document]
        kept = len(ranked) - math.ceil(similarity * len(ranked) - 1e-9) + 1
        for shingle in ranked[:kept].tolist():
            groups = posting.setdefault(shingle, {})
            for root in list(groups):
                members = groups.pop(root)
                now = forest.find(root)  # it may have been joined to another since
                if now != forest.find(document) and any(
                    _alike(ranks[document], ranks[m], similarity) for m in members
                ):
                    forest.join(document, now)
                    now = forest.find(document)
                groups.setdefault(now, []).extend(members)
            groups.setdefault(forest.find(document), []).append(document)
    first: dict[int, int] = {}
    return [first.setdefault(forest.find(d), d) for d in range(len(sets))]


def _alike(a: Shingles, b: Shingles, similarity: float) -> bool:
    if min(len(a), len(b)) < similarity * max(len(a), len(b)) - 1e-9:
        return False
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common >= similarity * (len(a) + len(b) - common) - 1e-9


def _by_rarity(sets: Sequence[Shingles]) -> list[Shingles]:
    """Each set as ranks, rarest shingle of the whole corpus first."""
    joined = np.concatenate(sets)
    _, place, count = np.unique(joined, return_inverse=True, return_counts=True)
    rank = np.empty(len(count), dtype=np.uint64)
    rank[np.argsort(count, kind="stable")] = np.arange(len(count), dtype=np.uint64)
    ends = np.cumsum([len(s) for s in sets])[:-1]
    return [np.sort(part) for part in np.split(rank[place], ends)]


class _Forest:
    """Union-find with path halving."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(a)] = self.find(b)


@lru_cache(maxsize=1 << 18)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest())


def _hash(text: str, salt: str) -> int:
    """64 bits of the words, so that layout and case do not matter."""
    words = " ".join(_WORD.findall(text.casefold())) or text.strip()
    data = f"{salt}\0{words}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(data).digest()[:8])
