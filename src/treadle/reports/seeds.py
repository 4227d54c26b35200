"""Runs of several methods from several seeds: one row a method, with the spread between seeds.

A subject is `<method>-s<seed>`; every other subject that was measured is a start. For each method

    mean +- sd over seeds,   and the gain over the start with its 95% interval by Student's t

<step>/table.md     the table as Markdown
the manifest        the same numbers
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Summary, Workspace
from treadle.reports import numbers
from treadle.reports.folder import read_run
from treadle.reports.stages import Stage, headline, stages_of

TABLE = "table.md"
_SEEDED = re.compile(r"(.+)-s(\d+)")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% of Student's t for 1, 2, ... degrees of freedom; the normal's 1.96 above."""


@dataclass(frozen=True)
class Spread:
    """One method over its seeds."""

    method: str
    values: tuple[float, ...]
    """Of each seed, in order."""
    mean: float
    sd: float | None
    gain: float | None
    """Over the start."""
    low: float | None
    high: float | None
    """Ends of the gain's 95% interval over seeds."""
    seconds: float
    """Of training, mean over seeds."""


class SeedTable(Summary):
    """Prints and keeps the table."""

    name: str = "table"
    minutes: float = Field(0.1, gt=0.0)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        stages = stages_of(read_run(workspace.root, leave_out=self.name))
        start, rows = spreads(stages)
        lines = seed_table(start, rows)
        write_text(workspace.folder / TABLE, "\n".join(lines) + "\n")
        for line in lines:
            workspace.progress.say(line)
        return {"kind": "table", "rows": [asdict(row) for row in rows]}


def spreads(stages: Sequence[Stage]) -> tuple[Stage | None, list[Spread]]:
    """The start, which is the last stage without a seed, and the methods as first measured.

    Raises:
        TreadleError: no stage has a seed.
    """
    start: Stage | None = None
    methods: dict[str, list[Stage]] = {}
    for stage in stages:
        found = _SEEDED.fullmatch(stage.subject)
        if stage.baseline or headline(stage) is None:
            continue
        if found:
            methods.setdefault(found[1], []).append(stage)
        elif not methods:
            start = stage
    if not methods:
        raise TreadleError(
            "no measured stage is called `<method>-s<seed>`, such as `grpo-s0`: name runs so"
        )
    return start, [_spread(name, found, start) for name, found in methods.items()]


def _spread(method: str, stages: Sequence[Stage], start: Stage | None) -> Spread:
    values = tuple(_value(stage) for stage in stages)
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    gain = None if start is None else mean - _value(start)
    half = None
    if sd is not None:
        half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * sd / math.sqrt(n)
    low, high = (None, None) if gain is None or half is None else (gain - half, gain + half)
    seconds = math.fsum(stage.seconds or 0.0 for stage in stages) / n
    return Spread(method, values, mean, sd, gain, low, high, seconds)


def _value(stage: Stage) -> float:
    figure = headline(stage)
    assert figure is not None  # stages without one were left out
    return figure["value"]


def seed_table(start: Stage | None, rows: Sequence[Spread]) -> list[str]:
    """Lines of a Markdown table, the best mean first."""
    head = ["", "held-out reward", "sd over seeds", "each seed", "gain, 95%", "training"]
    lines = [_line(head), _line(["---"] * len(head))]
    if start is not None:
        lines.append(_line([start.subject, numbers.percent(_value(start)), "", "", "", ""]))
    for row in sorted(rows, key=lambda r: -r.mean):
        gain = "-" if row.gain is None else numbers.points(row.gain)
        if row.low is not None and row.high is not None:
            gain += f" ({numbers.points(row.low)} to {numbers.points(row.high)})"
        lines.append(
            _line(
                [
                    row.method,
                    numbers.percent(row.mean),
                    "-" if row.sd is None else numbers.points(row.sd).removeprefix("+"),
                    ", ".join(map(numbers.percent, row.values)),
                    gain,
                    numbers.duration(row.seconds),
                ]
            )
        )
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
