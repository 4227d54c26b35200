"""Signs of reward hacking: what rewards pay for, besides what they are meant to.

A policy that games its reward gets longer or repeats itself while the reward rises. So each step
logs how long completions are, how much of them repeats, and how far those that were rewarded
above their group differ in both from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.inference.request import Completion

NGRAM = 4
"""Tokens in a row that count as repeated where they came before."""


def repetition(tokens: Sequence[int]) -> float:
    """Share of n-grams that are copies of an earlier one: 1 - different / all; 0 where there are
    none."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def signs(
    completions: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Of groups of completions and their rewards.

    repetition         mean share of repeated n-grams
    length_rewarded    mean tokens of the completions above their group's mean reward, less those
                       of the ones below it; positive where length pays
    repeated_rewarded  the same of repetition
    """
    repeated = [[repetition(c.tokens) for c in group] for group in completions]
    lengths = [[float(len(c.tokens)) for c in group] for group in completions]
    flat = [r for group in repeated for r in group]
    return {
        "repetition": sum(flat) / len(flat),
        "length_rewarded": _rewarded(lengths, rewards),
        "repeated_rewarded": _rewarded(repeated, rewards),
    }


def _rewarded(values: Sequence[Sequence[float]], rewards: Sequence[Sequence[float]]) -> float:
    """Mean over groups whose rewards differ; 0 where there are none."""
    differences = []
    for group, given in zip(values, rewards, strict=True):
        mean = sum(given) / len(given)
        above = [v for v, r in zip(group, given, strict=True) if r > mean]
        below = [v for v, r in zip(group, given, strict=True) if r < mean]
        if above and below:
            differences.append(sum(above) / len(above) - sum(below) / len(below))
    return sum(differences) / len(differences) if differences else 0.0
