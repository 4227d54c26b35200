"""Byte-pair encoding written from the paper (Sennrich et al. 2016), as slow and plain as can be."""

from __future__ import annotations

import itertools
from collections import Counter

import regex


def train(texts: list[str], pattern: str, merges: int, min_frequency: int) -> list[tuple]:
    """The merges in order, each a pair of byte strings.

    Ties go to the pair whose tokens are older; the 256 bytes are ordered as GPT-2 orders them.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    age = {bytes([b]): i for i, b in enumerate(printable)}
    age |= {bytes([b]): 188 + i for i, b in enumerate(b for b in range(256) if b not in printable)}
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    learned = []
    while len(learned) < merges:
        pairs = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], age[p[0]], age[p[1]]))
        if pairs[best] < min_frequency:
            break
        learned.append(best)
        age.setdefault(best[0] + best[1], len(age))
        words = [(join(word, best), n) for word, n in words]
    return learned


def join(word: list[bytes], pair: tuple) -> list[bytes]:
    out, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def encode(text: str, pattern: str, merges: list[tuple]) -> list[bytes]:
    """Tokens of a text: in each piece, the merges in the order in which they were learned."""
    tokens = []
    for piece in regex.findall(pattern, text):
        word = [bytes([b]) for b in piece.encode()]
        for pair in merges:
            word = join(word, pair)
        tokens += word
    return tokens
