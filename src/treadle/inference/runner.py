"""The seam between scheduling and arithmetic: what one pass is, and who computes it.

A scheduler decides which tokens of which sequences run and in which pages their keys and values
lie. A runner owns weights and pages and turns that into logits; it knows nothing of requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from treadle.inference.adapters import Adapters
from treadle.inference.sampling import peaks

Name = tuple[int, int]
"""Of a sequence: its request's number, and which of the request's n it is."""


@dataclass(frozen=True)
class Batch:
    """New tokens of some sequences, one sequence after another.

    Token j of sequence i has position `starts[i] + j`. Its key and value go to place
    `position % page` of page `tables[i][position // page]`, and it sees all that its sequence
    holds up to itself. Sequences may share pages that lie wholly before their new tokens.
    """

    tokens: list[int]
    counts: list[int]
    """New tokens of each sequence, at least one."""
    starts: list[int]
    """Tokens of each sequence that its pages hold already."""
    tables: list[list[int]]
    """Pages of each sequence, enough for its new tokens."""
    outputs: list[int]
    """How many of the last new tokens of each sequence want logits; 0 while a prompt is unread."""
    adapters: list[str | None] = field(default_factory=list)
    """Of each sequence; empty: none has one."""
    names: list[Name] = field(default_factory=list)
    """Of each sequence; runners whose pages last do without."""


class Runner(ABC):
    """A model with its pages. Not thread-safe."""

    page: int
    """Tokens in a page."""
    pages: int
    """How many there are; `tables` hold 0 .. pages - 1."""
    vocab: int
    context: int
    """Longest sequence."""
    refusal: str = ""
    """Why the model cannot continue a text; empty where it can."""
    adapters: Adapters | None = None
    """What requests may name besides the model itself; None: nothing."""
    lasting: bool = True
    """Pages keep all that was written to them, so that others with the same beginning can share
    them, and a sequence can be cut back. False: pages only count tokens, and what is kept of a
    sequence goes by its name."""

    @abstractmethod
    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        """Store the new tokens' keys and values; float32 logits of the wanted tokens, in order."""

    def peaks(self, logits: Float[Tensor, "N V"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """Of each row the likeliest token, and log sum exp: what every draw needs."""
        return peaks(logits)

    def fork(self, name: Name, other: Name) -> None:
        """`other` goes on from what `name` holds."""
        return

    def end(self, name: Name) -> None:
        """This sequence is gone, or begins anew."""
        return

    def forget(self) -> None:
        """The weights have changed; what pages hold is not asked for again."""
        return

    def close(self) -> None:
        """It will not run again; who works for it may go."""
        return

    def weights(self) -> dict[int, int]:
        """Bytes of the weights in this process, by where they lie: runners may share them."""
        return {}

    @abstractmethod
    def copy(self, source: int, target: int) -> None:
        """Copy a page, for a sequence that goes its own way from here."""

    @abstractmethod
    def save(self, page: int) -> Tensor:
        """A page's content as one tensor, for a store outside."""

    @abstractmethod
    def load(self, page: int, content: Tensor) -> None:
        """Put back what `save` gave."""
