"""`treadle pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.command import Command


def pull(
    name: Annotated[
        str | None, typer.Argument(help="A known model, or a hub id; without it, list the known.")
    ] = None,
) -> None:
    """Fetch a model and print where it is; runs and other commands do so by themselves."""
    from treadle.models.hub import pull as hub
    from treadle.models.hub.known import KNOWN

    if name is None:
        for known, model in KNOWN.items():
            typer.echo(f"{known:24} {model.size / 1e6:5.0f} MB  {model.terms}")
        return
    pulled = hub.pull(name, progress=lambda line: typer.echo(line, err=True))
    typer.echo(pulled.path)


COMMAND = Command(
    name="pull",
    run=pull,
    examples=(
        "treadle pull",
        "treadle pull smollm2-135m-instruct",
        "treadle pull HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)
