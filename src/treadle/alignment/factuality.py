"""Factuality: the share of a completion's claims that retrieved evidence bears out.

    r = supported claims / claims,     a claim is a sentence with at least two content words

For each claim the likeliest sentences of the evidence are found by BM25 (Robertson and Zaragoza
2009). One of them supports the claim if it holds nearly all of its content words, all of its
numbers and names, and is denied exactly as it is. That is a judgement of words: what is true but
put otherwise counts as unsupported, so a policy learns to keep to its sources, and no more.
After Min et al. 2023, FActScore, arXiv:2305.14251.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field

from treadle.alignment.rewards import Reward
from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.bm25 import WordIndex
from treadle.data.rating import Rater
from treadle.data.records import Problem
from treadle.data.source import Env

CARD = Card(
    id="al.reward.factual",
    paper="Min et al. 2023, FActScore, arXiv:2305.14251; Robertson and Zaragoza 2009 (BM25)",
    summary="A reward for claims that retrieved evidence supports, word by word.",
    recipe="treadle run quickstart steps.3.source.reward='{kind: Factuality, evidence: facts.txt}'",
    oracle="tests/alignment/test_alignment_factuality.py::test_planted_claims_are_told_apart",
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w[\w'-]*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DENIALS = frozenset(["not", "no", "never", "none", "nor", "neither", "cannot", "without"])
_LIGHT = """
a an the of in on at to for from by with as is are was were be been being it its this that
these those and or but which who whom whose has have had do does did there their his her
he she they them also than then so such i you we
"""


class Factuality(Reward):
    """Of a text that is to keep to the evidence."""

    evidence: str = Field(min_length=1)
    """A text file; its sentences are what is known."""
    found: int = Field(5, ge=1)
    """Sentences that are looked at for each claim."""
    covered: float = Field(0.8, gt=0.0, le=1.0)
    """Share of a claim's content words that one of them must hold."""

    def open(self, env: Env, patience: float) -> Rater:
        open_library(self.evidence)  # takes longer than an answer may
        return super().open(env, patience)

    def __call__(self, problem: Problem, completion: str) -> float:
        """Raises TreadleError where the evidence cannot be read; no claim at all is worth 0."""
        claims = [c for c in map(claim_of, _SENTENCE.split(completion)) if len(c.words) > 1]
        if not claims:
            return 0.0
        library = open_library(self.evidence)
        return sum(self.supported(c, library) for c in claims) / len(claims)

    def supported(self, claim: Claim, library: Library) -> bool:
        exact = claim.exact | (claim.words & library.names)
        return any(
            exact <= known.words
            and claim.denied == known.denied
            and len(claim.words & known.words) >= self.covered * len(claim.words)
            for known in library.nearest(claim, self.found)
        )


@dataclass(frozen=True)
class Claim:
    """A sentence as a bag of what it says."""

    words: frozenset[str]
    """Stems of content words."""
    exact: frozenset[str]
    """Numbers, and words with a capital: the first may be a name as well."""
    denied: bool


def claim_of(sentence: str) -> Claim:
    raw = words_of(sentence)
    low = [w.lower() for w in raw]
    exact = {w.lower() for w in raw if w[0].isupper() or any(c.isdigit() for c in w)}
    denials = sum(w in _DENIALS or w.endswith("n't") for w in low)
    light = _DENIALS.union(_LIGHT.split())
    words = {stem(w) for w in low if w not in light and not w.endswith("n't")}
    return Claim(frozenset(words), frozenset(words & set(map(stem, exact))), denials % 2 == 1)


def words_of(sentence: str) -> list[str]:
    return _WORD.findall(_THOUSANDS.sub("", sentence))


def stem(word: str) -> str:
    """Plural and third person taken off; crude, but the same on both sides."""
    word = word.removesuffix("'s")
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


class Library:
    """Sentences, found by their content words."""

    def __init__(self, sentences: list[str]) -> None:
        self.claims = [claim_of(s) for s in sentences]
        within = (w for s in sentences for w in words_of(s)[1:])
        self.names = frozenset(stem(w.lower()) for w in within if w[0].isupper())
        """Words that have a capital within a sentence: also where a claim writes them small."""
        self.index = WordIndex([sorted(c.words) for c in self.claims])

    def nearest(self, claim: Claim, count: int) -> list[Claim]:
        best = np.argsort(-self.index.scores(claim.words), kind="stable")
        return [self.claims[i] for i in best[:count]]


@lru_cache(maxsize=4)
def open_library(path: str) -> Library:
    """The sentences of a file.

    Raises:
        TreadleError: the file is not there or empty, or the library for BM25 is absent.
        FileFormatError: it is no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TreadleError(
            f"Factuality: the evidence {path} cannot be read ({error.strerror})"
        ) from None
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"Factuality: the evidence {path} is no UTF-8 text ({error.reason} at byte "
            f"{error.start}): convert it"
        ) from None
    sentences = [s.strip() for s in _SENTENCE.split(text) if s.strip()]
    if not sentences:
        raise TreadleError(f"Factuality: the evidence {path} has no sentence")
    return Library(sentences)
