"""What a text must look like, told to the sampler token by token.

A constraint is a value that a request carries; a guide follows one completion. The engine asks for
the tokens that may come next, samples among them, and tells the guide which it took.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Bool

from treadle.core.config import Config
from treadle.tokenizers.tokenizer import Tokenizer


class Guide(ABC):
    """Follows one completion."""

    @abstractmethod
    def mask(self) -> Bool[np.ndarray, " V"]:
        """Tokens that may come next, a stop token where the text may end.

        Raises:
            TreadleError: the constraint cannot be followed further; the text ends, unfinished.
        """

    @abstractmethod
    def advance(self, token: int) -> None:
        """The token that was taken; one of those that the mask allowed."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the text is whole and nothing may follow."""


class Constraint(Config):
    """A shape: the texts that may be written."""

    @abstractmethod
    def build(self, tokenizer: Tokenizer, vocab: int) -> Guide:
        """A guide at the start of a completion, for a model with `vocab` logits.

        Raises:
            TreadleError: the constraint is not valid, or allows no text.
        """
