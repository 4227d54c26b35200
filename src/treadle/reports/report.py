"""The report of a run: one HTML page that needs nothing else, and the same figures as JSON.

    treadle report runs/quickstart

A step at the end of a pipeline writes it; the command writes it for any run, finished or not.
What was not measured is shown as not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.files import write_json, write_text
from treadle.core.pipeline import Summary, Workspace
from treadle.reports import numbers, plots
from treadle.reports.curves import FIRST, place_of
from treadle.reports.document import document
from treadle.reports.folder import read_run
from treadle.reports.words import LESS_IS_BETTER, STATES

CARD = Card(
    id="plan.report",
    paper="Agresti and Min 2005, Biometrics 61(2); Wilson 1927, JASA 22",
    summary="One self-contained HTML page a run: results with intervals, curves, answers, costs.",
    recipe="treadle report runs/quickstart",
    oracle="tests/reports/test_reports_page.py::test_every_figure_is_on_the_page",
)

PAGE, DATA = "report.html", "report.json"
SAMPLES, SHOWN_FILES = 8, 200
TITLES = {
    "loss": "Loss",
    "reward": "Reward",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "kl": "KL to the reference",
    "mismatch": "Sampler mismatch",
    "completion_tokens": "Completion length",
    "overall": "All tasks",
}


class Report(Summary):
    """Writes `report.html` and `report.json` from what the other steps recorded."""

    name: str = "report"
    minutes: float = Field(0.2, gt=0.0)
    samples: int = Field(SAMPLES, ge=0)
    """Most problems whose answers are shown."""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        page = write_report(
            workspace.root, workspace.folder, samples=self.samples, leave_out=self.name
        )
        workspace.progress.say(f"{self.name}: {page}")
        return {"kind": "report", "page": PAGE, "bytes": page.stat().st_size}


def write_report(
    run: Path, out: Path, *, samples: int = SAMPLES, leave_out: str = "report"
) -> Path:
    """Write the report of the run in folder `run` into folder `out`; return the page's path.

    Args:
        samples: most problems whose answers are shown.
        leave_out: name of the run's step that is not reported on: the report itself.

    Raises:
        TreadleError: `run` is no run's folder, or matplotlib is missing.
        FileFormatError: a file of the run is damaged.
    """
    data = document(read_run(run, leave_out=leave_out), samples=samples)
    page = render(data)
    write_json(out / DATA, data)
    write_text(out / PAGE, page)
    return out / PAGE


def render(data: Mapping[str, Any]) -> str:
    """The page that shows a document; every text in it is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    room = files("treadle.reports")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        figure=numbers.figure,
        interval=numbers.interval,
        plain=numbers.plain,
        count=numbers.count,
        size=numbers.size,
        duration=numbers.duration,
        energy=numbers.energy,
        percent=numbers.percent,
        points=numbers.points,
        listed=_listed,
    )
    template = environment.from_string(room.joinpath("page.html.j2").read_text(encoding="utf-8"))
    units = {c["unit"] for c in data["columns"]}
    return (
        template.render(
            d=data,
            css=Markup(room.joinpath("page.css").read_text(encoding="utf-8")),
            plots={"intervals": _intervals(data), "training": _training(data)},
            measured_on=_measured_on(data),
            lower=[u for u in LESS_IS_BETTER if u in units],
            titles=TITLES,
            states=STATES,
            shown_files=SHOWN_FILES,
        )
        + "\n"
    )


def _listed(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _intervals(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A plot for each result that at least two stages have."""
    from markupsafe import Markup

    drawn = []
    for place, column in enumerate(data["columns"]):
        rows = [
            {"subject": s["subject"], "baseline": s["baseline"], "figure": figure}
            for s in data["stages"]
            if (figure := s["results"].get(column["name"])) and figure["value"] is not None
        ]
        if len(rows) > 1:
            svg = plots.interval_plot(
                rows, title=column["name"], unit=column["unit"], key=f"interval-{place}"
            )
            drawn.append({**column, "svg": Markup(svg)})
    return drawn


def _training(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    parts = []
    for part in data["training"]:
        drawn = [
            {
                "metric": curve["metric"],
                "last": curve["values"][-1],
                "svg": Markup(plots.curve_plot(curve, key=f"{part['step']}-{place}")),
            }
            for place, curve in enumerate(part["curves"])
        ]
        parts.append(
            {
                **part,
                "first": [p for p in drawn if place_of(p["metric"]) < len(FIRST)],
                "rest": [p for p in drawn if place_of(p["metric"]) == len(FIRST)],
            }
        )
    return parts


def _measured_on(data: Mapping[str, Any]) -> dict[str, str]:
    """By result: how many problems, tokens or documents it was measured on."""
    said = {}
    for column in data["columns"]:
        name, unit = column["name"], column["unit"]
        counts = {s["results"][name]["n"] for s in data["stages"] if name in s["results"]}
        told = "–".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
        said[name] = f"{told} problems" if unit == "accuracy" else f"n = {told}"
    return said
