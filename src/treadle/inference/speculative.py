"""Speculative decoding by look-up: guess the next tokens from the text itself, check them at once.

A guess runs through the model in one pass with the last token. At each position the engine draws
its token as ever, with the random number of that step; while the draw equals the guess, the next
position's logits are already there. A guess is accepted with its probability under the model, so
the distribution, and even the text of a seed, is that of plain decoding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config

CARD = Card(
    id="inf.speculative",
    paper="Leviathan et al. 2023, arXiv:2211.17192; Saxena 2023, prompt lookup decoding",
    summary="Guesses from n-grams of the text, verified in one pass: same text, fewer passes.",
    recipe="treadle run standard-benchmarks steps.0.engine.draft='{kind: NGram}'",
    oracle="tests/inference/test_inference_speculative.py::test_text_is_that_of_plain_decoding",
)


class Draft(Config):
    """A shape: what may come next."""

    @abstractmethod
    def __call__(self, tokens: Sequence[int]) -> list[int]:
        """Guesses of the tokens that follow; empty where there is none."""


class NGram(Draft):
    """What followed the last occurrence of the text's last n tokens."""

    longest: int = Field(3, ge=1)
    """Tokens that must agree, where possible; fewer down to `shortest`."""
    shortest: int = Field(2, ge=1)
    tokens: int = Field(4, ge=1)
    """Guesses at a time."""
    reach: int = Field(2048, ge=1)
    """How many tokens back to look."""

    def __call__(self, tokens: Sequence[int]) -> list[int]:
        seen = list(tokens[-self.reach :])
        for size in range(min(self.longest, len(seen) - 1), self.shortest - 1, -1):
            tail = seen[-size:]
            for at in range(len(seen) - size - 1, -1, -1):
                if seen[at] == tail[0] and seen[at : at + size] == tail:
                    return seen[at + size : at + size + self.tokens]
        return []
