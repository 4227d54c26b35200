"""`treadle report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.command import Command


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it [RUN].")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Problems whose answers are shown.")] = 8,
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write the report of a run, finished or not: one HTML page, and its figures as JSON."""
    from treadle.reports.report import write_report

    page = write_report(run, out or run, samples=samples)
    typer.echo(page)
    if show:
        webbrowser.open(page.resolve().as_uri())


COMMAND = Command(
    name="report",
    run=report,
    examples=("treadle report runs/quickstart --open", "treadle report runs/mine --out public"),
)
