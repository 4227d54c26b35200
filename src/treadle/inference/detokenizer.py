"""Tokens to text as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.core.cards import Card
from treadle.tokenizers.stream import TextStream
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.stream",
    paper="No paper: engineering.",
    summary="Streams text token by token: no broken characters, no partial stop strings; cancel.",
    recipe="treadle chat smollm2-135m-instruct",
    oracle="tests/inference/test_inference_engine.py::test_stream_concatenates_to_full_text",
)


class Detokenizer:
    """Text of one growing completion."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stream, self.stop = TextStream(tokenizer), tuple(stop)
        self.text = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> None:
        """Add a token; afterwards `stopped` says whether a stop string is complete."""
        self._append(self.stream.push(token))

    def finish(self) -> None:
        """No more tokens: what is left of a broken character becomes a replacement mark."""
        self._append(self.stream.end())

    def _append(self, new: str) -> None:
        if self.stopped:
            return
        start = len(self.text)
        self.text += new
        for stop in self.stop:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                self.text, self.stopped = self.text[:at], True

    def take(self, *, final: bool) -> str:
        """Text that is certain and has not been taken; what may begin a stop string is held."""
        end = len(self.text)
        if not final:
            end -= max((self._overlap(s) for s in self.stop), default=0)
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that is a beginning of `stop`."""
        for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
            if self.text.endswith(stop[:size]):
                return size
        return 0
