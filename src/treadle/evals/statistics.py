"""Figures with 95% confidence intervals.

share of right answers   Wilson's interval (in `core/results.py`)
ratio, as a perplexity   percentiles of bootstrap resamples over documents (Efron 1979)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from treadle.core.results import Figure, Unit

RESAMPLES = 1000


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[Float[np.ndarray, " R"]], Float[np.ndarray, " R"]],
    unit: Unit,
    *,
    seed: int = 0,
) -> Figure:
    """transform(sum a / sum b), such as the perplexity of a corpus; n counts the documents.

    A resample with nothing in b, as of what is rare, has no such figure and is left out.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n, value = len(a), float(transform(np.array([a.sum() / b.sum()]))[0])
    if n == 1:
        return {"value": value, "low": None, "high": None, "n": n, "unit": unit}
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, n, n) for _ in range(RESAMPLES))
    resampled = np.array([a[d].sum() / b[d].sum() for d in draws if b[d].any()])
    low, high = np.quantile(transform(resampled), (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high), "n": n, "unit": unit}


def bits(nats: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    return nats / math.log(2)
