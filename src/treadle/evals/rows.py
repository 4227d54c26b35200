"""Where a benchmark's examples come from: files, folders, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from treadle.core.config import Config
from treadle.core.errors import FileFormatError
from treadle.data.read import read_rows

Row = Mapping[str, Any]


class Examples(Config):
    """One split of a benchmark, in its own order."""

    path: str
    """A file or folder, or `hf:owner/name`; see `data/read.py`."""
    split: str = "test"
    """Of a data set on the hub."""
    subset: str | None = None
    """Its configuration, where it has several, such as `ARC-Easy`."""

    def open(self) -> Iterator[Row]:
        """One mapping an example."""
        return read_rows(self.path, split=self.split, subset=self.subset)

    def take(self, limit: int | None = None) -> list[Row]:
        """The first `limit`, or all."""
        return list(islice(self.open(), limit))


def wrong_row(task: str, row: Row) -> FileFormatError:
    """The error for a row that has none of the forms that a task knows."""
    return FileFormatError(f"task `{task}` cannot read a row with the fields {', '.join(row)}")
