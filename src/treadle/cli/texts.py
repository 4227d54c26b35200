"""Texts that a command is given: as arguments, in a file, or on standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from treadle.inference.reader import Pair

Texts = Annotated[
    list[str] | None,
    typer.Argument(help="Texts; without any and without --file, the lines of standard input."),
]
File = Annotated[
    Path | None, typer.Option("--file", "-f", help="Texts of a file: .jsonl, .csv, .txt, ...")
]
Key = Annotated[str, typer.Option("--key", help="Field of a row that holds the text.")]
Longest = Annotated[int, typer.Option("--longest", min=4, help="Cut texts to so many tokens.")]


def texts_of(
    texts: list[str] | None,
    file: Path | None,
    key: str,
    second: str | None = None,
    second_key: str | None = None,
) -> list[Pair]:
    """Texts, or pairs of texts where a second one or its key is given.

    Raises:
        TreadleError: texts come from two places, or from none, or one is empty.
        FileFormatError: a row has no such text.
    """
    from treadle.core.errors import FileFormatError, TreadleError
    from treadle.data.fields import text
    from treadle.data.read import read_rows

    if texts and file is not None:
        raise TreadleError("give texts or --file, not both")
    if second_key is not None and file is None:
        raise TreadleError("--second-key names a field of the rows of a --file; without, --second")
    found: list[Pair] = []
    if file is not None:
        for index, row in enumerate(read_rows(file, separator="\n")):
            try:
                other = second if second_key is None else text(row, second_key)
                found.append((text(row, key), other))
            except FileFormatError as error:
                raise FileFormatError(f"{file}: row {index}: {error}") from None
    else:
        lines = texts or [line.rstrip("\n") for line in sys.stdin]
        found = [(line, second) for line in lines]
    for index, pair in enumerate(found):
        if not all(part is None or part.strip() for part in pair):
            raise TreadleError(f"text {index} is empty: leave it out")
    if not found:
        raise TreadleError("there is no text: give some as arguments, by --file or on its input")
    return found
