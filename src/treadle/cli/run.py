"""`treadle run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.command import Command

Target = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe, a .yaml or .py file, or a run's folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH=VALUE", help="Changes, such as steps.0.fit.steps=20."),
]


def run(
    target: Target,
    overrides: Overrides = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Folder of the run [runs/NAME].")
    ] = None,
) -> None:
    """Run a recipe. Finished steps are kept: the same command again goes on where it stopped."""
    from treadle.cli.targets import load
    from treadle.core.execute import execute
    from treadle.core.progress import standard

    pipeline = load(target, overrides or ())
    folder = directory or Path("runs") / pipeline.name
    progress = standard()
    try:
        progress.say(f"{pipeline.name}: {len(pipeline.steps)} steps in {folder}")
        execute(pipeline, folder, progress)
    finally:
        progress.close()


COMMAND = Command(
    name="run",
    run=run,
    examples=(
        "treadle run quickstart",
        "treadle run quickstart --dir /tmp/first",
        "treadle show quickstart > mine.yaml; treadle run mine.yaml",
    ),
    stopped="stopped; the same command goes on from where it was",
)
