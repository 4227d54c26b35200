"""Log-probabilities in the two shapes that OpenAI's protocol has."""

from __future__ import annotations

from typing import Any

from treadle.serving.worker import Piece
from treadle.tokenizers.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for a probability of zero, which JSON cannot hold as a logarithm."""


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


class TextLogprobs:
    """The lists of a plain completion, over the tokens so far.

    Args:
        top: alternatives a token; None where no log-probabilities are wanted.
        offset: characters of the text before.
    """

    def __init__(self, top: int | None, offset: int) -> None:
        self.top, self.offset = top, offset
        self._lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add(self, tokenizer: Tokenizer, piece: Piece) -> None:
        if self.top is None:
            return
        for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.tops, strict=True):
            if token in tokenizer.stop_ids:
                continue
            entry = _entry(tokenizer, token, logprob)
            others = [_entry(tokenizer, *other) for other in top]
            likely = {other["token"]: other["logprob"] for other in (*others, entry)}
            row = (entry["token"], entry["logprob"], likely)
            for column, value in zip(self._lists.values(), (*row, self.offset), strict=True):
                column.append(value)
            self.offset += len(entry["token"])

    def content(self) -> dict[str, list[Any]] | None:
        return None if self.top is None else self._lists

    def rest(self) -> TextLogprobs:
        """Empty lists that go on where these end."""
        return TextLogprobs(self.top, self.offset)
