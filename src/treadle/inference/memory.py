"""Where the keys and values of a torch runner lie, and how a pass attends to them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.runner import Batch, Name
from treadle.nn.context import Context


class Memory(ABC):
    """Keys and values of all sequences of a runner."""

    lasting: bool
    """Pages keep all that was written to them: see `Runner.lasting`."""
    context: int
    """Longest sequence."""

    @abstractmethod
    def arrange(self, batch: Batch) -> tuple[list[int], Context]:
        """The order in which the sequences' tokens run, and how they attend."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What the keys and values take now."""

    def fork(self, name: Name, other: Name) -> None:
        """`other` goes on from what `name` holds."""
        return

    def end(self, name: Name) -> None:
        """This sequence is gone."""
        return

    def copy(self, source: int, target: int) -> None:
        """Copy a page."""
        return

    def shapes(self) -> Context | None:
        """The context of a pass of one token that must run before the first `load`."""
        return None

    def save(self, page: int) -> Tensor:
        """A page's content as one tensor."""
        raise TreadleError(f"{type(self).__name__} has no pages to save: use the Paged cache")

    def load(self, page: int, content: Tensor) -> None:
        """Put back what `save` gave."""
        raise TreadleError(f"{type(self).__name__} has no pages to load: use the Paged cache")
