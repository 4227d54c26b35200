"""`treadle recipes`."""

from __future__ import annotations

import typer

from treadle.cli.command import Command


def recipes() -> None:
    """List the recipes, each with what it does."""
    from treadle.cli.targets import recipe_files, summary

    files = recipe_files()
    width = max(map(len, files), default=0)
    for name, path in files.items():
        typer.echo(f"{name:{width}}  {summary(path)}".rstrip())


COMMAND = Command(name="recipes", run=recipes, examples=("treadle recipes",))
