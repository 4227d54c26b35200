"""Rows to records: by the format that is named, or by that which the first row is in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from treadle.core.errors import FileFormatError
from treadle.data.formats import (
    AlpacaFormat,
    FlanFormat,
    Format,
    KTOFormat,
    LabelledMessagesFormat,
    MessagesFormat,
    PreferenceFormat,
    ProblemFormat,
    Row,
    ShareGPTFormat,
    ShareGPTPreferenceFormat,
    TextFormat,
    TranscriptFormat,
)
from treadle.data.records import Record


def detect(row: Row) -> Format:
    """The format that a row is in.

    Raises:
        FileFormatError: none fits; names the keys.
    """
    keys = row.keys()
    if keys >= {"conversations", "chosen", "rejected"}:
        return ShareGPTPreferenceFormat()
    if keys >= {"chosen", "rejected"}:
        both = (row["chosen"], row["rejected"])
        is_transcript = all(isinstance(t, str) and t.lstrip().startswith("Human:") for t in both)
        return TranscriptFormat() if is_transcript else PreferenceFormat()
    if keys >= {"prompt", "completion", "label"}:
        return KTOFormat()
    if keys >= {"messages", "label"}:
        return LabelledMessagesFormat()
    if "messages" in keys:
        return MessagesFormat()
    if "conversations" in keys:
        turns = row["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
            return MessagesFormat(messages="conversations")
        return ShareGPTFormat()
    if "instruction" in keys:
        output = next((k for k in ("output", "response") if k in keys), "output")
        return AlpacaFormat(output=output)
    if keys >= {"inputs", "targets"}:
        return FlanFormat()
    if keys >= {"prompt", "completion"}:
        return FlanFormat(inputs="prompt", targets="completion")
    if keys >= {"question", "answer"} and "####" in str(row["answer"]):
        return ProblemFormat(answer_after="####")
    if "text" in keys:
        return TextFormat()
    raise FileFormatError(
        f"no known format has the keys {', '.join(sorted(map(str, keys)))}; name the format and "
        'its keys, for instance FlanFormat(inputs="en", targets="fr")'
    )


def convert(
    rows: Iterable[Row], format: Format | None = None, *, name: str = "data"
) -> Iterator[Record]:
    """Rows to records; without a format, that of the first row.

    Raises:
        FileFormatError: with the name, the index of the row (from 0) and its key.
    """
    meaning, rows = settle(rows, format, name=name)
    for index, row in enumerate(rows):
        yield read_as(meaning, row, index, name=name)


def settle(
    rows: Iterable[Row], format: Format | None, *, name: str
) -> tuple[Format, Iterator[Row]]:
    """The format, found by the first row where none is given, and all the rows.

    Raises:
        FileFormatError: there are no rows, or none of the formats fits.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise FileFormatError(f"{name}: there are no rows")
    try:
        return format or detect(first), chain([first], iterator)
    except FileFormatError as error:
        raise FileFormatError(f"{name}: row 0: {error}") from None


def read_as(format: Format, row: Row, index: int, *, name: str) -> Record:
    """One row; a wrong one is named by index and key."""
    try:
        return format(row)
    except FileFormatError as error:
        kind = type(format).__name__
        raise FileFormatError(f"{name}: row {index}: {error} ({kind})") from None
