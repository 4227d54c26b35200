"""How far the labels of preference pairs are trusted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from treadle.alignment.trees import Tree
from treadle.core.config import Config
from treadle.data.source import Env


class Confidence(Config):
    """A shape: for each pair the probability that its label is the right way round."""

    @abstractmethod
    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> Float[Tensor, " P"] | None:
        """Of the pairs `numbers`; None where all are certain."""


class Certain(Confidence):
    """Every label is right."""

    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> None:
        return None
