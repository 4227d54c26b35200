"""The kinds of cache that an engine can be told to use."""

from __future__ import annotations

from abc import abstractmethod

from treadle.core.config import Config
from treadle.inference.memory import Memory
from treadle.models.decoder import DecoderModel


class Cache(Config):
    """A shape: how keys and values are kept."""

    @abstractmethod
    def build(self, model: DecoderModel, *, pages: int, page: int) -> Memory:
        """Room for the keys and values of this model, `pages` pages of `page` tokens."""
