"""Scores with 95% confidence intervals.

proportion   Wilson 1927: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
mean         x +- z s / sqrt(n)
ratio        percentiles of bootstrap resamples over documents (Efron 1979)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A figure, the number of examples behind it, and a 95% confidence interval."""

    value: float
    n: int
    low: float
    high: float


def score(values: Sequence[float]) -> Score:
    """The mean; Wilson's interval where all values are 0 or 1."""
    assert values, "a score needs at least one example"
    if all(value in (0.0, 1.0) for value in values):
        return wilson(sum(values), len(values))
    return mean(values)


def wilson(successes: float, n: int) -> Score:
    """A proportion; the interval stays in [0, 1] and has a width even at 0 and 1."""
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Score(p, n, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Sequence[float]) -> Score:
    """A mean with its standard error; one value alone has an endless interval."""
    x = np.asarray(values, dtype=np.float64)
    n, centre = len(x), float(x.mean())
    half = Z * float(x.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Score(centre, n, centre - half, centre + half)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[Float[np.ndarray, " R"]], Float[np.ndarray, " R"]],
    *,
    seed: int = 0,
) -> Score:
    """transform(sum a / sum b), such as the perplexity of a corpus, resampled by document."""
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    value = float(transform(np.array([a.sum() / b.sum()]))[0])
    if len(a) == 1:
        return Score(value, 1, -math.inf, math.inf)
    picks = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    resampled = transform(a[picks].sum(1) / b[picks].sum(1))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Score(value, len(a), float(low), float(high))
