"""Near duplicates by comparing every pair (Broder 1997)."""

from __future__ import annotations

import re


def shingles(text: str, size: int) -> set[tuple]:
    words = re.findall(r"\w+", text.casefold())
    size = min(size, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def clusters(texts: list[str], size: int, similarity: float) -> list[int]:
    """For each text the index of the first of its cluster."""
    sets = [shingles(t, size) for t in texts]
    cluster = list(range(len(texts)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if len(a & b) >= similarity * len(a | b) and cluster[i] != cluster[j]:
                low, high = sorted((cluster[i], cluster[j]))
                cluster = [low if c == high else c for c in cluster]
    return cluster
