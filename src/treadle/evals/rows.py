"""Rows: the examples of a benchmark as dictionaries, from a local file or the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from treadle.core.config import Config
from treadle.core.errors import FileFormatError, TreadleError

Row = Mapping[str, Any]


class Rows(Config):
    """A shape: opens to the examples of one split, in a fixed order."""

    @abstractmethod
    def open(self) -> Iterator[Row]:
        """One dictionary an example."""

    def take(self, limit: int | None = None) -> list[Row]:
        """The first `limit` rows, or all."""
        return list(islice(self.open(), limit))


class JsonLines(Rows):
    """A file with one JSON object a line, gzipped where its name ends in `.gz`."""

    path: str

    def open(self) -> Iterator[Row]:
        path = Path(self.path)
        if not path.is_file():
            raise TreadleError(f"{path}: no such file; give the path of a .jsonl or .jsonl.gz file")
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise FileFormatError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise FileFormatError(f"{path}:{number}: not a JSON object, but {line[:40]!r}")
                yield row


class TextFile(Rows):
    """A text file as one row `{"page": ...}`, gzipped where its name ends in `.gz`."""

    path: str

    def open(self) -> Iterator[Row]:
        path = Path(self.path)
        if not path.is_file():
            raise TreadleError(f"{path}: no such file; give the path of a .txt or .txt.gz file")
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            yield {"page": file.read()}


class Hub(Rows):
    """A split of a data set on the Hugging Face hub, through `datasets` and its cache."""

    name: str
    """As `openai/gsm8k`."""
    split: str = "test"
    subset: str | None = None
    """The configuration, where the data set has several, such as `ARC-Easy`."""

    def open(self) -> Iterator[Row]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise TreadleError(
                f"reading `{self.name}` from the hub needs `datasets`: pip install 'treadle[data]'"
            ) from None
        yield from load_dataset(self.name, self.subset, split=self.split)


def wrong_row(task: str, row: Row) -> FileFormatError:
    """The error for a row that has none of the forms that a task knows."""
    return FileFormatError(f"task `{task}` cannot read a row with the fields {', '.join(row)}")
