"""Speculative decoding: guess the next tokens, check them all in one pass.

Guesses run through the model together with the last known token. At each position the engine draws
its token as ever, with the random number of that step; while the draw equals the guess, the next
position's logits are already there. So the distribution, and even the text of a seed, is that of
plain decoding, whoever guesses:

    look-up       what followed when these tokens occurred before            P(accept) = p(guess)
    a model       its own draw by the same random number, which agrees more often than not where
                  the two distributions are near (a coupling of p and q)

Several continuations of one text are a tree: see `guesses.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.inference.runner import Runner
from treadle.inference.sequence import Active
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.speculative",
    paper="Leviathan et al. 2023, arXiv:2211.17192; Saxena 2023, prompt lookup decoding",
    summary="Guesses from n-grams of the text, verified in one pass: same text, fewer passes.",
    recipe="treadle generate smollm2-135m-instruct 'One two three. One two' --draft NGram",
    oracle="tests/inference/test_inference_speculative.py::test_text_is_that_of_plain_decoding",
)


class Guesser(ABC):
    """Guesses for the sequences of one engine."""

    @abstractmethod
    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[list[int]]]:
        """For each some continuations, the likeliest first, of at most so many tokens."""

    def saw(self, sequences: Sequence[Active], rows: Sequence[int]) -> None:
        """These got their last tokens from the logits of these rows of the pass."""
        return

    def forget(self) -> None:
        """Weights have changed."""
        return


class Draft(Config):
    """A shape: what may come next."""

    @abstractmethod
    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        """Guesses for an engine with this runner.

        Raises:
            TreadleError: this draft cannot guess for it.
        """


class NGram(Draft):
    """What followed the last occurrences of the text's last n tokens."""

    longest: int = Field(3, ge=1)
    """Tokens that must agree, where possible; fewer down to `shortest`."""
    shortest: int = Field(2, ge=1)
    tokens: int = Field(4, ge=1)
    """Guesses at a time."""
    branches: int = Field(1, ge=1)
    """Occurrences that were followed by different tokens, all checked in one pass."""
    reach: int = Field(2048, ge=1)
    """How many tokens back to look."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        return LookUp(self)

    def after(self, tokens: Sequence[int]) -> list[list[int]]:
        """What may follow these tokens: as many continuations as `branches`, or fewer."""
        seen = list(tokens[-self.reach :])
        found: list[list[int]] = []
        for size in range(min(self.longest, len(seen) - 1), self.shortest - 1, -1):
            tail = seen[-size:]
            for at in range(len(seen) - size - 1, -1, -1):
                if seen[at] == tail[0] and seen[at : at + size] == tail:
                    next_ = seen[at + size : at + size + self.tokens]
                    if not any(next_ == other[: len(next_)] for other in found):
                        found.append(next_)
                        if len(found) == self.branches:
                            return found
        return found


class LookUp(Guesser):
    def __init__(self, draft: NGram) -> None:
        self.draft = draft

    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[list[int]]]:
        return [
            [path[:count] for path in self.draft.after(s.slice(0, s.length))]
            for s, count in zip(sequences, most, strict=True)
        ]
