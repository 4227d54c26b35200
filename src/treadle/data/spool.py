"""Records that can be read in any order without being held in memory.

Rows lie as JSON lines in a temporary file that has no name and goes with the process. Every row
is read as a record once at the start, so that a wrong one is named before training begins.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any, final

from treadle.core.errors import TreadleError
from treadle.data.convert import read_as, settle
from treadle.data.formats import Format, Row
from treadle.data.read import read_rows
from treadle.data.records import Record, record_text
from treadle.data.split import LeakFreeSplit, Part


@final
class Records:
    """The records of one part of a data set, by number."""

    def __init__(self, spool: Spool, format: Format, numbers: Sequence[int]) -> None:
        self.spool, self.format, self.numbers = spool, format, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.format(self.spool[self.numbers[index]])


@final
class Spool:
    """Rows by number, on disk."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the spool
        self._starts = array("Q", [0])
        self._lock = Lock()

    def append(self, row: Row) -> None:
        line = json.dumps(row, default=str).encode()  # dates and the like, which Parquet holds
        self._file.seek(self._starts[-1])
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._starts[index], self._starts[index + 1]
        with self._lock:
            self._file.seek(start)
            line = self._file.read(end - start)
        row: dict[str, Any] = json.loads(line)
        return row


def open_records(
    path: str,
    format: Format | None,
    kind: type[Record],
    *,
    split: str = "train",
    parts: LeakFreeSplit,
) -> dict[Part, Records]:
    """Each part of a file, folder or data set.

    Args:
        format: what a row means; None: that of the first row decides.
        kind: the records that are wanted.
        split: of a Hugging Face data set.
        parts: what is held out.

    Raises:
        FileFormatError: with the path, the index of the row and its key.
        TreadleError: the rows are records of another kind.
    """
    meaning, rows = settle(read_rows(path, split=split), format, name=path)
    spool = Spool()

    def texts() -> Iterator[str]:
        for index, row in enumerate(rows):
            record = read_as(meaning, row, index, name=path)
            if not isinstance(record, kind):
                raise TreadleError(
                    f"{path}: row {index}: {type(meaning).__name__} gives a "
                    f"{type(record).__name__}, but a {kind.__name__} is needed; name another "
                    "format, with its keys"
                )
            spool.append(row)
            yield record_text(record)

    if parts.validation or parts.test:
        where = parts(texts())
    else:
        where = [Part.TRAIN for _ in texts()]
    numbers = {part: array("Q", (i for i, w in enumerate(where) if w == part)) for part in Part}
    return {part: Records(spool, meaning, numbers[part]) for part in Part}
