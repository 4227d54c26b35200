"""`treadle version`."""

from __future__ import annotations

import typer

from treadle.cli.command import Command


def version() -> None:
    """The versions of treadle, Python and the libraries that decide results."""
    from treadle.core.execute import versions

    for name, number in versions().items():
        typer.echo(f"{name:14} {number}")


COMMAND = Command(name="version", run=version, examples=("treadle version",))
