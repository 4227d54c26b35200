"""Conversations out of files, in any of the formats of the field."""

from __future__ import annotations

from functools import lru_cache

from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.data.formats import Format
from treadle.data.records import Chat
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Records, open_records
from treadle.data.supervised import Conversations


class ConversationFiles(Conversations):
    """Conversations of a file, a folder or a Hugging Face data set (see `data/read.py`)."""

    path: str = Field(min_length=1)
    format: Format | None = None
    """What a row means; if none is named, the first row decides."""
    split: str = "train"
    """Of a Hugging Face data set."""
    parts: LeakFreeSplit = LeakFreeSplit(validation=0, test=0)
    """What is held out; `HeldOutConversations` has the validation part."""

    def conversation(self, index: int) -> Chat:
        return _chat(_records(self, Part.TRAIN), index)

    def count(self) -> int:
        return len(_records(self, Part.TRAIN))


class HeldOutConversations(Conversations):
    """The validation part of conversations."""

    of: ConversationFiles

    def conversation(self, index: int) -> Chat:
        return _chat(_records(self.of, Part.VALIDATION), index)

    def count(self) -> int:
        return len(_records(self.of, Part.VALIDATION))


def _chat(records: Records, index: int) -> Chat:
    record = records[index]
    assert isinstance(record, Chat)  # open_records saw to it
    return record


@lru_cache(maxsize=8)
def _opened(files: ConversationFiles) -> dict[Part, Records]:
    return open_records(files.path, files.format, Chat, split=files.split, parts=files.parts)


def _records(files: ConversationFiles, part: Part) -> Records:
    opened = _opened(files)
    if not len(opened[part]):
        held = {name.value: len(records) for name, records in opened.items()}
        raise TreadleError(
            f"{files.path}: no conversation is in the {part} part ({held}); change `parts`"
        )
    return opened[part]
