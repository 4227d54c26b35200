"""What a completion may contain, token by token: the hook for grammars and schemas.

The engine asks for the mask before it draws a token and tells the constraint which one it drew.
Masked tokens get probability 0 before temperature and truncation see the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Bool
from torch import Tensor


class Constraint(ABC):
    """State of one completion. Lives on the CPU; the engine moves masks where they are needed."""

    @abstractmethod
    def fork(self) -> Constraint:
        """An independent copy: a request's constraint is forked for each of its completions."""

    @abstractmethod
    def mask(self) -> Bool[Tensor, " V"] | None:
        """Which tokens may come next, at least one; None if all may.

        Where the text may end, the tokenizer's stop tokens are allowed. The mask may be shorter
        than the model's vocabulary (padded heads): what lies behind its end is forbidden.

        Raises:
            TreadleError: the constraint cannot be followed further; the text ends as cancelled.
        """

    @abstractmethod
    def advance(self, token: int) -> None:
        """A token that `mask` allowed was drawn. Not called for a stop token."""

    @abstractmethod
    def done(self) -> bool:
        """Nothing may follow but the end of the text, so that no pass is spent on it."""
