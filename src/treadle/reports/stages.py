"""The stages of a model in one run, each with what was measured of it and what it cost.

A stage is a *subject* that evaluations name: `base`, `sft`, `grpo`, `quantised`. What it cost is
that of the step that made it: the step of that name, or the one that the evaluation reads.
Baselines stand beside the stages for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from treadle.core.results import EVALUATION, OVERALL, Z95, Figure, Sample, pooled
from treadle.reports.folder import RunFolder, StepRecord

RIGHT = 1.0
"""A score from which an answer counts as right."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the headline tables; None is what was not measured."""

    subject: str
    baseline: bool
    results: Mapping[str, Figure] = field(default_factory=dict)
    made_from: tuple[str, ...] = ()
    """Earlier stages on the way to it."""
    evaluations: tuple[str, ...] = ()
    """Steps that measured it."""
    tokens_per_second: float | None = None
    size_bytes: int | None = None
    answering_peak_bytes: int | None = None
    """Highest memory while it was measured."""
    parameters: int | None = None
    parameters_trained: int | None = None
    seconds: float | None = None
    """Time of the step that made it; so are the three below."""
    joules: float | None = None
    energy: str | None = None
    making_peak_bytes: int | None = None


@dataclass(frozen=True)
class Column:
    """A result that some stage has."""

    name: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two stages on the same problems, in pairs."""

    before: str
    after: str
    n: int
    right_right: int
    wrong_right: int
    right_wrong: int
    wrong_wrong: int
    difference: float
    """Mean score after, less the mean before."""
    low: float
    high: float
    """Ends of its 95% interval."""


def stages_of(run: RunFolder) -> list[Stage]:
    """Baselines first, then the stages in the order in which the run measures them."""
    subjects: dict[str, list[StepRecord]] = {}
    for step in run.done():
        if step.metrics.get("kind") == EVALUATION:
            subjects.setdefault(str(step.metrics["subject"]), []).append(step)
    makers = {name: _maker(name, steps, run) for name, steps in subjects.items()}
    stages = [_stage(makers[name], name, steps) for name, steps in subjects.items()]
    for place, stage in enumerate(stages):
        line = _line(makers[stage.subject], run)
        earlier = [s.subject for s in stages[:place] if not s.baseline]
        stages[place] = replace(stage, made_from=tuple(n for n in earlier if makers[n] in line))
    return sorted(stages, key=lambda s: not s.baseline)


def columns_of(stages: Sequence[Stage]) -> list[Column]:
    """Accuracy over everything first, then the task families, then other units."""
    found = {
        name: Column(name, figure["unit"]) for s in stages for name, figure in s.results.items()
    }
    units = list(dict.fromkeys(["accuracy", "score", *(c.unit for c in found.values())]))
    return sorted(found.values(), key=lambda c: (c.name != OVERALL, units.index(c.unit)))


def path_of(stages: Sequence[Stage]) -> list[Stage]:
    """The stages on the way to the final model."""
    models = [s for s in stages if not s.baseline]
    return [s for s in models if s is models[-1] or s.subject in models[-1].made_from]


def ways_of(stages: Sequence[Stage]) -> list[Stage]:
    """Stages from which no other was made: where there are several, they are alternatives."""
    passed = {name for s in stages for name in s.made_from}
    return [s for s in stages if not s.baseline and s.subject not in passed]


def headline(stage: Stage) -> Figure | None:
    """Its accuracy over all problems."""
    families = [f for f in stage.results.values() if f["unit"] == "accuracy"]
    return stage.results.get(OVERALL) or (families[0] if families else None)


def problems_of(stage: Stage) -> dict[str, int]:
    """Task families and how many problems of each."""
    return {name: f["n"] for name, f in stage.results.items() if f["unit"] == "accuracy"}


def measured_of(path: Sequence[Stage]) -> list[Stage]:
    """The stages whose accuracy was measured: by the problems of the last one, if others were."""
    measured = [s for s in path if headline(s) is not None]
    alike = [s for s in measured if problems_of(s) == problems_of(measured[-1])]
    return alike if len(alike) > 1 else measured


def compare(before: Stage, after: Stage, run: RunFolder) -> Comparison | None:
    """Pair the two by problem; None where they have no problem in common.

    The interval is that of Agresti and Min 2005 for paired proportions, which adds half a pair to
    each of the four cells: with d_i the differences and m = n + 2,
    mean = sum d / m,  variance = (sum d^2 + 1 - (sum d)^2 / m) / m^2.
    """
    first, second = samples_of(before, run), samples_of(after, run)
    common = [p for p in first if p in second]
    if not common:
        return None
    cells = {(a, b): 0 for a in (True, False) for b in (True, False)}
    total = squares = 0.0
    for problem in common:
        a, b = first[problem]["score"], second[problem]["score"]
        cells[a >= RIGHT, b >= RIGHT] += 1
        total, squares = total + b - a, squares + (b - a) ** 2
    m = len(common) + 2
    half = Z95 * math.sqrt((squares + 1 - total**2 / m) / m**2)
    return Comparison(
        before=before.subject,
        after=after.subject,
        n=len(common),
        right_right=cells[True, True],
        wrong_right=cells[False, True],
        right_wrong=cells[True, False],
        wrong_wrong=cells[False, False],
        difference=total / len(common),
        low=max(total / m - half, -1.0),
        high=min(total / m + half, 1.0),
    )


def samples_of(stage: Stage, run: RunFolder) -> dict[str, Sample]:
    """Its scored answers, by problem."""
    from treadle.core.results import read_samples

    folders = [run.path / step for step in stage.evaluations]
    return {row["problem"]: row for folder in folders for row in read_samples(folder)}


def _stage(maker: StepRecord | None, subject: str, evaluations: Sequence[StepRecord]) -> Stage:
    results: dict[str, Figure] = {}
    for step in evaluations:
        for name, figure in step.metrics["results"].items():
            results[f"{name} ({step.name})" if name in results else name] = figure
    families = [f for name, f in results.items() if f["unit"] == "accuracy"]
    if OVERALL not in results and len(families) > 1:
        results[OVERALL] = pooled(families)
    baseline = any(bool(s.metrics.get("baseline")) for s in evaluations)
    made = {} if maker is None or baseline else maker.manifest
    cost: Mapping[str, Any] = made.get("cost", {})
    trained: Mapping[str, Any] = made.get("metrics", {})
    return Stage(
        subject=subject,
        baseline=baseline,
        results=results,
        evaluations=tuple(s.name for s in evaluations),
        tokens_per_second=_last(evaluations, "tokens_per_second"),
        size_bytes=_last(evaluations, "size_bytes"),
        answering_peak_bytes=max(s.manifest["cost"]["peak_bytes"] for s in evaluations),
        parameters=_last(evaluations, "parameters") or trained.get("parameters"),
        parameters_trained=trained.get("parameters_trained"),
        seconds=cost.get("seconds"),
        joules=cost.get("joules"),
        energy=cost.get("energy"),
        making_peak_bytes=cost.get("peak_bytes"),
    )


def _line(maker: StepRecord | None, run: RunFolder) -> list[StepRecord | None]:
    """A step and all that it rests on; None stands for what came from outside, as all does."""
    line: list[StepRecord | None] = [None]
    left = [maker]
    while left:
        step = left.pop()
        if step is not None and step not in line:
            line.append(step)
            left += map(run.step, step.manifest.get("reads", ()))
    return line


def _maker(subject: str, evaluations: Sequence[StepRecord], run: RunFolder) -> StepRecord | None:
    """The step that made what was evaluated; None for a model that came from outside."""
    read = [name for step in evaluations for name in step.manifest["reads"]]
    alone = read[0] if len(set(read)) == 1 else ""
    return run.step(subject) or run.step(alone)


def _last(steps: Sequence[StepRecord], metric: str) -> Any:
    values = [s.metrics[metric] for s in steps if s.metrics.get(metric) is not None]
    return values[-1] if values else None
