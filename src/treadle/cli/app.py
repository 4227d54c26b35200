"""The table of commands. Their files import what is heavy only when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle import __version__
from treadle.cli import (
    bench,
    chat,
    export,
    generate,
    merge,
    plan,
    pull,
    reason,
    recipes,
    report,
    run,
    schema,
    serve,
    show,
    techniques,
    trial,
    version,
)
from treadle.cli import eval as evaluate
from treadle.cli.command import Command, guarded

COMMANDS: tuple[Command, ...] = (
    run.COMMAND,
    recipes.COMMAND,
    show.COMMAND,
    report.COMMAND,
    chat.COMMAND,
    generate.COMMAND,
    serve.COMMAND,
    bench.COMMAND,
    trial.COMMAND,
    evaluate.COMMAND,
    reason.COMMAND,
    export.COMMAND,
    merge.COMMAND,
    plan.COMMAND,
    pull.COMMAND,
    schema.COMMAND,
    techniques.COMMAND,
    version.COMMAND,
)

ABOUT = """The whole craft of small language models, on one machine.

A recipe is a value: show it, change it with path=value, run it, and run it again to go on
where it stopped."""


def build(*, debug: bool = False) -> typer.Typer:
    """The application. With `debug`, mistakes end in a traceback."""
    app = typer.Typer(
        help=ABOUT,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    for command in COMMANDS:
        app.command(command.name, epilog=command.epilog())(guarded(command, debug=debug))
    app.callback()(_options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"treadle {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None: ...
