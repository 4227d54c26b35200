"""`treadle report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.command import Command


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the page [RUN].")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Problems whose answers are shown.")] = 8,
) -> None:
    """Write the page and the figures of a run, finished or not: report.html and report.json."""
    from treadle.reports.report import write_report

    typer.echo(write_report(run, out or run, samples=samples))


COMMAND = Command(
    name="report",
    run=report,
    examples=("treadle report runs/quickstart", "treadle report runs/quickstart --out /tmp/page"),
)
