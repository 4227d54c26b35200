"""A report as plain data: what `report.json` holds, and all that the page shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from treadle.core.results import REASONING, TRAIN
from treadle.reports.curves import Curve, read_curves, skipped_steps, thin
from treadle.reports.folder import RunFolder, StepRecord
from treadle.reports.samples import pick
from treadle.reports.seeds import SeedTable, spreads
from treadle.reports.stages import (
    Stage,
    columns_of,
    compare,
    headline,
    measured_of,
    path_of,
    samples_of,
    stages_of,
    ways_of,
)
from treadle.reports.words import sentences

FORMAT = "treadle-report-1"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What HTML or UTF-8 cannot carry: controls other than tab and line feed, lone surrogates."""


def document(run: RunFolder, *, samples: int) -> dict[str, Any]:
    """Everything a report says, as JSON values.

    Args:
        samples: most problems whose answers are shown.
    """
    stages = stages_of(run)
    ends = _ends(stages)
    comparison = compare(*ends, run) if ends else None
    training = [t for step in run.steps if (t := _training(step)) is not None]
    steps = [_step(s) for s in run.steps]
    reasoning = [
        {"step": s.name, "rows": s.metrics["rows"]}
        for s in run.done()
        if s.metrics.get("kind") == REASONING
    ]
    spread = _spread(stages, steps)
    unfinished = [s.name for s in run.steps if s.state != "done"]
    finished = [str(s.manifest["finished"]) for s in run.done()]
    return dict(
        clean(
            {
                "format": FORMAT,
                "name": run.name,
                "finished": None if unfinished else max(finished, default=None),
                "unfinished": unfinished,
                "result": sentences(
                    run.name, stages, comparison, steps, training, reasoning, spread
                ),
                "columns": [asdict(c) for c in columns_of(stages)],
                "stages": [asdict(s) for s in stages],
                "comparison": asdict(comparison) if comparison else None,
                "steps": steps,
                "reasoning": reasoning,
                "spread": spread,
                "training": training,
                "samples": _samples(stages, run, samples),
                "recipe": run.recipe,
                "command": f"treadle run pipeline.yaml --dir runs/{run.name}",
                "versions": _by_value(run, "versions"),
                "machine": _by_value(run, "machine"),
                "seeds": {f"{s.name}.{p}": v for s in run.steps for p, v in seeds(s.config)},
                "files": [
                    {"path": f"{s.name}/{name}", **entry}
                    for s in run.done()
                    for name, entry in s.manifest["files"].items()
                ],
            }
        )
    )


def clean(value: Any) -> Any:
    """The same with what JSON and HTML cannot carry replaced: NaN by None, controls by U+FFFD."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value.replace("\r\n", "\n"))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    return [clean(v) for v in value] if isinstance(value, list | tuple) else value


def seeds(config: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every `seed` of a configuration, with where it stands."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            where = f"{path}.{key}" if path else str(key)
            if key == "seed" and isinstance(value, int):
                yield where, value
            yield from seeds(value, where)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from seeds(value, f"{path}.{index}")


def _ends(stages: list[Stage]) -> tuple[Stage, Stage] | None:
    """The first and the last stage whose accuracy was measured, where one leads to the other."""
    if len(ways_of(stages)) > 1:
        return None
    measured = measured_of(path_of(stages))
    return (measured[0], measured[-1]) if len(measured) > 1 else None


def _spread(stages: list[Stage], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Methods over their seeds, the best mean first, where the run has a table of them."""
    if not any(s["kind"] == SeedTable.__name__ and s["state"] == "done" for s in steps):
        return None
    start, rows = spreads(stages)
    figure = None if start is None else headline(start)
    return {
        "start": None if start is None else start.subject,
        "value": None if figure is None else figure["value"],
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: -row.mean)],
    }


def _step(step: StepRecord) -> dict[str, Any]:
    cost = step.cost or {}
    files: Mapping[str, Mapping[str, Any]] = step.manifest.get("files", {})
    return {
        "name": step.name,
        "kind": str(step.config.get("kind", "")),
        "state": step.state,
        "seconds": cost.get("seconds"),
        "joules": cost.get("joules"),
        "energy": cost.get("energy"),
        "peak_bytes": cost.get("peak_bytes"),
        "written_bytes": sum(f["bytes"] for f in files.values()) if step.manifest else None,
        "metrics": {
            k: v
            for k, v in step.metrics.items()
            if isinstance(v, str | int | float) and k not in ("kind", "metrics_file")
        },
    }


def _training(step: StepRecord) -> dict[str, Any] | None:
    curves = read_curves(step.metrics_file())
    if not curves and step.metrics.get("kind") != TRAIN:
        return None
    return {
        "step": step.name,
        "state": step.state,
        "skipped_steps": skipped_steps(step.metrics_file()),
        "curves": [_thinned(c) for c in curves],
    }


def _thinned(curve: Curve) -> dict[str, Any]:
    steps, values = thin(curve.steps, curve.values)
    smoothed = dict(zip(curve.steps, curve.smoothed, strict=False))
    return {
        "metric": curve.metric,
        "points": len(curve.steps),
        "steps": steps,
        "values": values,
        "smoothed": [smoothed[s] for s in steps] if smoothed else [],
    }


def _samples(stages: list[Stage], run: RunFolder, limit: int) -> dict[str, Any] | None:
    answered = [s for s in path_of(stages) if samples_of(s, run)]
    if not answered or not limit:
        return None
    before = answered[0] if len(answered) > 1 else None
    pairs = pick(samples_of(before, run) if before else {}, samples_of(answered[-1], run), limit)
    return {
        "before": before.subject if before else None,
        "after": answered[-1].subject,
        "pairs": [asdict(p) for p in pairs],
    }


def _by_value(run: RunFolder, what: str) -> dict[str, list[dict[str, Any]]]:
    """Each entry of the manifests' `what`, with the steps in which it had which value."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in run.done():
        for name, value in step.manifest.get(what, {}).items():
            same = next((e for e in found.setdefault(name, []) if e["value"] == value), None)
            if same is None:
                found[name].append({"value": value, "steps": [step.name]})
            else:
                same["steps"].append(step.name)
    return found
