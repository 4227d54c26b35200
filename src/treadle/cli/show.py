"""`treadle show`."""

from __future__ import annotations

import typer

from treadle.cli.command import Command
from treadle.cli.run import Overrides, Target


def show(target: Target, overrides: Overrides = None) -> None:
    """Print a recipe, or a model family's preset, as YAML: every part and every value."""
    from treadle.cli.targets import load_any
    from treadle.core.config import to_yaml

    typer.echo(to_yaml(load_any(target, overrides or ())), nl=False)


COMMAND = Command(
    name="show",
    run=show,
    examples=(
        "treadle show quickstart",
        "treadle show quickstart > mine.yaml",
        "treadle show runs/quickstart",
        "treadle show gpt2",
    ),
)
