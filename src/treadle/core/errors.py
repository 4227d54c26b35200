"""Errors that a user can act on: each names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 20
"""Choices that a message lists at the most."""


class TreadleError(ValueError):
    """A mistake in what the user gave; the message says what to change.

    The command line prints these without a traceback.
    """


class ConfigError(TreadleError):
    """A configuration that does not fit its type."""


class FileFormatError(TreadleError):
    """A file that is truncated, corrupt, or not of the format its name claims."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean `rank`?``, or the choices if nothing is near."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    shown = known[:SHOWN] + [f"... ({len(known)} in all)"] * (len(known) > SHOWN)
    return f"; known: {', '.join(shown)}" if known else ""
