"""Training curves: read, smoothed, and thinned to what a plot can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

BOOKKEEPING = frozenset(("step", "steps", "tokens", "seconds", "skipped"))
FIRST = (
    "loss",
    "reward",
    "lr",
    "grad_norm",
    "kl",
    "mismatch",
    "completion_tokens",
)
"""Metrics that a reader looks for, in this order; any others come after them."""

POINTS = 240
"""Most points of a raw curve that is drawn."""


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of a training."""

    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    smoothed: tuple[float, ...]
    """Empty where there is nothing to smooth: few points, or a schedule."""


def place_of(metric: str) -> int:
    """Where a metric stands among those that a reader looks for; the parts of a reward by its
    side."""
    part = metric.startswith("reward_") and metric != "reward_std"
    name = "reward" if part else metric
    return FIRST.index(name) if name in FIRST else len(FIRST)


def read_curves(path: Path) -> list[Curve]:
    """All metrics of a file of JSON lines, those that a reader looks for first.

    A line that is torn (the run is under way) or not finite is left out. Where a step is told
    twice, as after a return to a checkpoint, the later line holds.
    """
    series: dict[str, dict[int, float]] = {}
    for row in _rows(path):
        step = int(row["step"])
        for metric, value in _numbers(row):
            series.setdefault(metric, {})[step] = value
    curves = [_curve(metric, points) for metric, points in series.items()]
    return sorted(curves, key=lambda c: place_of(c.metric))


def skipped_steps(path: Path) -> int:
    """Steps that the guard refused."""
    return len({row["step"] for row in _rows(path) if row.get("skipped") is True})


def smooth(values: Sequence[float]) -> tuple[float, ...]:
    """Mean over a tenth of the curve, centred, so that it does not lag behind.

    At the ends the window is what there is of it: no less than half.
    """
    sums = list(accumulate(values, initial=0.0))
    reach = max(1, len(values) // 20)
    out = []
    for place in range(len(values)):
        first, end = max(0, place - reach), min(len(values), place + reach + 1)
        out.append((sums[end] - sums[first]) / (end - first))
    return tuple(out)


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `POINTS` points: of each stretch its lowest and highest, so no spike is lost."""
    if len(steps) <= POINTS:
        return list(steps), list(values)
    kept: set[int] = {0, len(steps) - 1}
    stretches = POINTS // 2 - 1
    for k in range(stretches):
        stretch = range(k * len(steps) // stretches, (k + 1) * len(steps) // stretches)
        kept.add(min(stretch, key=lambda i: values[i]))
        kept.add(max(stretch, key=lambda i: values[i]))
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for metric, value in row.items():
        if metric in BOOKKEEPING or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            yield metric, float(value)
    tokens, seconds = row.get("tokens"), row.get("seconds")
    if isinstance(tokens, int) and isinstance(seconds, int | float) and seconds > 0:
        yield "tokens/s", tokens / seconds


def _curve(metric: str, points: Mapping[int, float]) -> Curve:
    steps = tuple(sorted(points))
    values = tuple(points[s] for s in steps)
    smoothed = smooth(values) if len(values) >= 10 and metric != "lr" else ()
    return Curve(metric, steps, values, smoothed)
