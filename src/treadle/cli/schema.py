"""`treadle schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from treadle.cli.command import Command


def schema(
    kind: Annotated[
        str, typer.Argument(help="A class or shape, such as LoRA or Step.")
    ] = "Pipeline",
) -> None:
    """Print the JSON Schema of configurations, so that an editor completes and checks YAML."""
    from treadle.core import registry
    from treadle.core.config import Config
    from treadle.core.schema import json_schema

    typer.echo(json.dumps(json_schema(registry.resolve(kind, Config)), indent=2))


COMMAND = Command(
    name="schema",
    run=schema,
    examples=(
        "treadle schema > treadle.schema.json",
        "treadle schema LoRA",
        "# first line of a YAML file:  # yaml-language-server: $schema=treadle.schema.json",
    ),
)
