"""The shape of a supply of plain text, with a part that is never trained on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from treadle.core.config import Config
from treadle.data.records import Text


class Documents(Config):
    """A shape: documents in a fixed order, split once and for all."""

    @abstractmethod
    def training(self) -> Iterator[Text]:
        """What may be trained on."""

    @abstractmethod
    def held_out(self) -> Iterator[Text]:
        """What may not."""

    def everything(self) -> Iterator[Text]:
        """Both: what may be read, if nothing is learned by it."""
        yield from self.training()
        yield from self.held_out()
