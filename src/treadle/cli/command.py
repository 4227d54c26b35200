"""What a command is, and what happens to errors that its user can mend."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Command:
    """A command of the command line; its help is the function's docstring."""

    name: str
    run: Callable[..., None]
    examples: tuple[str, ...]
    stopped: str = "stopped"
    """What Ctrl-C says."""

    def epilog(self) -> str:
        """The examples, laid out for the end of the help."""
        return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in self.examples)


def guarded(command: Command, *, debug: bool) -> Callable[..., None]:
    """The command's function; mistakes of the user end it with a message instead of a traceback."""

    @functools.wraps(command.run)
    def run(*args: Any, **kwargs: Any) -> None:
        from treadle.core.errors import TreadleError

        try:
            command.run(*args, **kwargs)
        except BrokenPipeError:  # `treadle techniques | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (TreadleError, OSError) as error:
            if debug:
                raise
            fail(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if debug:
                raise
            typer.echo(f"\n{command.stopped}", err=True)
            raise typer.Exit(130) from None

    return run


def fail(message: str) -> None:
    """Say what is wrong, on the error stream."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(message, err=True)
