"""Text out of files, with a part held out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.data.convert import convert
from treadle.data.documents import Documents
from treadle.data.formats import TextFormat
from treadle.data.read import read_rows
from treadle.data.records import Text
from treadle.data.split import LeakFreeSplit, Part


class TextFiles(Documents):
    """The documents of a file, a folder or a Hugging Face data set (see `data/read.py`)."""

    path: str = Field(min_length=1)
    key: str = "text"
    """The field of a row that holds the text."""
    separator: str = ""
    """What divides the documents of plain text files; if empty, a file is one document."""
    parts: LeakFreeSplit = LeakFreeSplit()

    def training(self) -> Iterator[Text]:
        return self.part(Part.TRAIN)

    def held_out(self) -> Iterator[Text]:
        return self.part(Part.VALIDATION)

    def everything(self) -> Iterator[Text]:
        return _texts(self)

    def part(self, part: Part) -> Iterator[Text]:
        """The documents of one part, in the order of the files.

        Raises:
            TreadleError: there is none.
        """
        parts = _parts(self)
        if part not in parts:
            raise TreadleError(
                f"{self.path}: of {len(parts)} documents none is in the {part} part; raise its "
                "fraction in `parts`, or cut the text into more documents with `separator`"
            )
        return (text for text, where in zip(_texts(self), parts, strict=True) if where == part)


@lru_cache(maxsize=8)
def _parts(files: TextFiles) -> tuple[Part, ...]:
    return tuple(files.parts(document.text for document in _texts(files)))


def _texts(files: TextFiles) -> Iterator[Text]:
    for record in convert(
        read_rows(files.path, separator=files.separator),
        TextFormat(key=files.key),
        name=files.path,
    ):
        assert isinstance(record, Text)
        yield record
