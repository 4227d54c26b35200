"""Text from tokens as they come: a character appears when its last byte is there."""

from __future__ import annotations

import codecs
from typing import final

from treadle.tokenizers.tokenizer import Tokenizer


@final
class TextStream:
    """Feed ids, get text; all pieces together equal `decode` of all ids (for valid UTF-8)."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        if token in self._skip:
            return ""
        return self._shown(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def end(self) -> str:
        """What is left: U+FFFD if the last character never became whole."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            return text.removeprefix(" ")
        return text
