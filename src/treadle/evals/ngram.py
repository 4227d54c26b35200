"""Interpolated modified Kneser-Ney n-grams: what counting alone makes of a text.

Chen and Goodman 1998, An Empirical Study of Smoothing Techniques (TR-10-98), section 3. With
h' the context h without its first token,

    p(w | h) = [a(hw) - D(a(hw))] / sum_v a(hv) + g(h) p(w | h')
    g(h)     = sum_v D(a(hv)) / sum_v a(hv)
    D(0) = 0,  D(c) = c - (c + 1) Y n_{c+1} / n_c  for c = 1, 2, 3,  D(c) = D(3) for c > 3
    Y = n_1 / (n_1 + 2 n_2),  n_c = how many n-grams of this order have a = c

a is the count at the highest order, and at lower ones how many different tokens come before the
n-gram. A context that was never seen passes all its mass on; below order one all tokens are alike.
Every order has its own discounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError

Ids = Int64[np.ndarray, " N"]
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where a text has too few n-grams of some count to estimate them."""
KEY_LIMIT = 2**63 - 1


class KneserNey(Config):
    """An n-gram model over token ids."""

    order: int = Field(5, ge=1, le=16)
    """Tokens in the longest n-gram: one more than the longest context."""

    def build(self, documents: Iterable[Sequence[int]], vocab: int) -> NgramModel:
        """Count the documents; n-grams do not cross from one to the next.

        Args:
            vocab: number of ids; all get a probability, seen or not.

        Raises:
            TreadleError: an id outside the vocabulary, or no tokens.
        """
        text = _Text.of(documents, vocab)
        if not len(text.tokens):
            raise TreadleError("the text for the n-grams has no tokens: check its source")
        return NgramModel(vocab, _levels(text, self.order, vocab))


@dataclass(frozen=True)
class Level:
    """The n-grams of one order. A context is the index of its n-gram in the level below."""

    keys: Int64[np.ndarray, " G"]
    """context * vocab + token, ascending."""
    shares: Float64[np.ndarray, " G"]
    """[a - D(a)] / sum a."""
    rests: Float64[np.ndarray, " H"]
    """g of each context; 1 where nothing was seen after it."""

    def find(self, keys: Ids) -> Ids:
        """Where each key stands, or -1."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


@dataclass(frozen=True)
class NgramModel:
    """Levels from order 1 up."""

    vocab: int
    levels: tuple[Level, ...]

    @property
    def grams(self) -> int:
        """N-grams of all orders."""
        return sum(len(level.keys) for level in self.levels)

    def logprobs(self, documents: Iterable[Sequence[int]]) -> Float64[np.ndarray, " M"]:
        """Natural logarithm of the probability of each token given those before it, document after
        document; a document's first token has nothing before it and is left out.

        Raises:
            TreadleError: an id outside the vocabulary.
        """
        text = _Text.of(documents, self.vocab)
        p = np.full(len(text.tokens), 1.0 / self.vocab)
        context = np.zeros(len(text.tokens), dtype=np.int64)
        for order, level in enumerate(self.levels, 1):
            known = (text.places >= order - 1) & (context >= 0)
            found = np.full(len(p), -1)
            found[known] = level.find(context[known] * self.vocab + text.tokens[known])
            share = np.where(found >= 0, level.shares[found], 0.0)
            p[known] = share[known] + level.rests[context[known]] * p[known]
            context = _before(found)
        logs: Float64[np.ndarray, " M"] = np.log(p[text.places > 0])
        return logs


@dataclass(frozen=True)
class _Text:
    tokens: Ids
    places: Ids
    """Of each token in its document."""

    @classmethod
    def of(cls, documents: Iterable[Sequence[int]], vocab: int) -> _Text:
        parts = [np.asarray(d, dtype=np.int64) for d in documents]
        tokens = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
        places = np.concatenate([*(np.arange(len(p)) for p in parts), np.zeros(0, dtype=np.int64)])
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise TreadleError(
                f"token ids go from {tokens.min()} to {tokens.max()}, but the vocabulary has "
                f"{vocab}: the text was encoded by another tokenizer"
            )
        return cls(tokens, places)


def _before(ids: Ids) -> Ids:
    """What ended one token earlier is the context of a token."""
    return np.concatenate([np.full(1, -1), ids[:-1]])


def _levels(text: _Text, order: int, vocab: int) -> tuple[Level, ...]:
    """Number the n-grams of each order, then count from what extends them to the left."""
    context = np.zeros(len(text.tokens), dtype=np.int64)
    ends: list[Ids] = []  # of the n-gram that ends at each token: its index, or -1
    keys: list[Ids] = []
    firsts: list[Ids] = []  # where each n-gram ends for the first time
    counts = np.zeros(0, dtype=np.int64)
    for k in range(1, order + 1):
        assert (len(keys[-1]) if keys else 1) * vocab < KEY_LIMIT
        inside = np.flatnonzero(text.places >= k - 1)
        found, first, inverse, counts = np.unique(
            context[inside] * vocab + text.tokens[inside],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        ids = np.full(len(text.tokens), -1)
        ids[inside] = inverse
        ends.append(ids)
        keys.append(found)
        firsts.append(inside[first])
        context = _before(ids)
    levels = []
    for k in range(order):
        below = len(keys[k - 1]) if k else 1
        if k < order - 1:  # each different n-gram one longer adds one to its end
            counts = np.bincount(ends[k][firsts[k + 1]], minlength=len(keys[k]))
        else:
            counts = np.bincount(ends[k][ends[k] >= 0], minlength=len(keys[k]))
        levels.append(_level(keys[k], counts, vocab, below))
    return tuple(levels)


def _level(keys: Ids, counts: Ids, vocab: int, contexts: int) -> Level:
    context = keys // vocab
    taken = np.array((0.0, *discounts(counts)))[np.minimum(counts, 3)]
    totals = np.bincount(context, counts, minlength=contexts)
    passed = np.bincount(context, taken, minlength=contexts)
    seen = totals > 0
    shares = np.divide(counts - taken, totals[context], out=np.zeros(len(keys)), where=counts > 0)
    rests = np.divide(passed, totals, out=np.ones(contexts), where=seen)
    return Level(keys, shares, rests)


def discounts(counts: Ids) -> tuple[float, float, float]:
    """D(1), D(2), D(3+) from how many n-grams have which count."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if not n[1:5].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    d1, d2, d3 = (c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
    if not (0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3):
        return FALLBACK
    return float(d1), float(d2), float(d3)
