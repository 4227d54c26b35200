"""Row formats of tasks that are not conversations: classes, word labels, grades, matching texts.

| format | a row |
|---|---|
| ClassFormat | `{text, label}`, or with `second` a pair (NLI) |
| TagFormat | `{tokens: [...], tags: [...]}` |
| RatedFormat | `{text, second, score}` |
| MatchFormat | `{query, positive}`, perhaps with `negatives` |
"""

from __future__ import annotations

from typing import Any

from treadle.core.errors import FileFormatError
from treadle.data.fields import optional_number, text
from treadle.data.formats import Format, Row
from treadle.data.records import Classified, Matched, Rated, Tagged


class ClassFormat(Format):
    """A text, or a pair of texts, with a label."""

    text: str = "text"
    second: str = ""
    """Key of the second text of a pair; empty where there is none."""
    label: str = "label"
    """Key of the label: its name, or its number from 0."""

    def __call__(self, row: Row) -> Classified:
        first, second = _texts(row, self.text, self.second)
        return Classified(first, second, _label(row.get(self.label), self.label))


class TagFormat(Format):
    """Words with a label each."""

    tokens: str = "tokens"
    tags: str = "tags"

    def __call__(self, row: Row) -> Tagged:
        words, tags = row.get(self.tokens), row.get(self.tags)
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or not words:
            raise FileFormatError(f"key `{self.tokens}`: expected a list of words")
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"{len(tags)} labels" if isinstance(tags, list) else type(tags).__name__
            raise FileFormatError(
                f"key `{self.tags}`: expected one label for each of {len(words)} words, "
                f"found {found}"
            )
        return Tagged(tuple(words), tuple(_label(t, self.tags) for t in tags))


class RatedFormat(Format):
    """A text, or a pair of texts, with a number."""

    text: str = "text"
    second: str = ""
    """Key of the second text of a pair; empty where there is none."""
    score: str = "score"

    def __call__(self, row: Row) -> Rated:
        first, second = _texts(row, self.text, self.second)
        value = optional_number(row, self.score)
        if value is None:
            raise FileFormatError(f"key `{self.score}` is missing")
        return Rated(first, second, value)


class MatchFormat(Format):
    """A query and a text that belongs to it, perhaps with texts that do not."""

    query: str = "query"
    positive: str = "positive"
    negatives: str = "negatives"

    def __call__(self, row: Row) -> Matched:
        query, positive = _texts(row, self.query, self.positive)
        assert positive is not None
        others = row.get(self.negatives) or []
        others = [others] if isinstance(others, str) else others
        if not isinstance(others, list) or not all(isinstance(n, str) and n for n in others):
            raise FileFormatError(f"key `{self.negatives}`: expected texts")
        return Matched(query, positive, tuple(others))


def _texts(row: Row, first: str, second: str) -> tuple[str, str | None]:
    found = [text(row, key) for key in (first, second) if key]
    for key, value in zip((first, second), found, strict=False):
        if not value.strip():
            raise FileFormatError(f"key `{key}` is empty")
    return found[0], found[1] if second else None


def _label(value: Any, key: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise FileFormatError(
            f"key `{key}`: expected the name or the number of a label, found {value!r}"
        )
    return value
