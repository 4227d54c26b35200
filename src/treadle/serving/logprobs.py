"""Log-probabilities in the two shapes that OpenAI's protocol has."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treadle.inference.request import Reading
from treadle.serving.texts import Text
from treadle.serving.ticket import Piece
from treadle.tokenizers.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for a probability of zero, which JSON cannot hold as a logarithm."""
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
Row = tuple[str, float | None, dict[str, float] | None, int]
"""An entry of each of `LISTS`."""


def chat_logprobs(tokenizer: Tokenizer, piece: Piece) -> list[dict[str, Any]]:
    """An entry for each token of a piece; the token that ended the text is not part of it."""
    return [
        {
            **_entry(tokenizer, token, logprob),
            "top_logprobs": [_entry(tokenizer, *other) for other in top],
        }
        for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.tops, strict=True)
        if token not in tokenizer.stop_ids
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}


@dataclass(frozen=True)
class Echoed:
    """A prompt as it is given back: its tokens, and where in the text each begins."""

    text: str
    ids: list[int]
    starts: list[int]


def echoed(tokenizer: Tokenizer, prompt: Text, ids: list[int]) -> Echoed:
    """
    Args:
        ids: what the model reads of the prompt, with what the tokenizer adds around a text.
    """
    if isinstance(prompt, str):
        spans = tokenizer.encode_spans(prompt)
        added = next(k for k in range(len(ids)) if ids[k : k + len(spans.ids)] == spans.ids)
        after = [len(prompt)] * (len(ids) - added - len(spans.ids))
        return Echoed(prompt, ids, [*[0] * added, *spans.starts, *after])
    utf8, place, starts = getincrementaldecoder("utf-8")("replace"), 0, list[int]()
    for token in ids:
        starts.append(place)
        if token not in tokenizer.special_ids:
            place += len(utf8.decode(tokenizer.token_bytes(token)))
    text = tokenizer.decode(ids)
    dropped = max(0, place - len(text))  # a first space, by tokenizers that put one there
    return Echoed(text, ids, [max(0, start - dropped) for start in starts])


class TextLogprobs:
    """The lists of a plain completion, gathered as its tokens come.

    Args:
        top: alternatives a token; None where no log-probabilities are wanted.
        offset: characters of the text before.
    """

    def __init__(self, top: int | None, offset: int = 0) -> None:
        self.top, self.offset = top, offset
        self._rows: list[Row] = []
        self._utf8 = getincrementaldecoder("utf-8")("replace")

    def echo(
        self, tokenizer: Tokenizer, echoed: Echoed, readings: Sequence[Reading | None]
    ) -> None:
        """Take up the prompt, of whose tokens the first has no log-probability."""
        if self.top is None:
            return
        for token, start, reading in zip(echoed.ids, echoed.starts, readings, strict=True):
            if reading is None:
                self._rows.append((_name(tokenizer, token), None, None, start))
            else:
                self._rows.append(_row(tokenizer, token, reading.logprob, reading.top, start))
        self.offset = len(echoed.text)

    def add(self, tokenizer: Tokenizer, piece: Piece) -> None:
        if self.top is None:
            return
        for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.tops, strict=True):
            if token in tokenizer.stop_ids:
                continue
            self._rows.append(_row(tokenizer, token, logprob, top, self.offset))
            # a token inside a character stands where the character does
            self.offset += len(self._utf8.decode(tokenizer.token_bytes(token)))

    def take(self) -> dict[str, list[Any]] | None:
        """What has come since the last call."""
        if self.top is None:
            return None
        rows, self._rows = self._rows, []
        return {name: [row[i] for row in rows] for i, name in enumerate(LISTS)}


def _row(
    tokenizer: Tokenizer, token: int, logprob: float, top: Sequence[tuple[int, float]], start: int
) -> Row:
    likely = {_name(tokenizer, other): max(value, LOWEST) for other, value in reversed(top)}
    name, value = _name(tokenizer, token), max(logprob, LOWEST)
    return name, value, {**likely, name: value}, start


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token as these lists spell it: they are keyed by text, so parts of characters differ."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
