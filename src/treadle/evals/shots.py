"""Shots: worked examples put before the question (Brown et al. 2020, arXiv:2005.14165)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from random import Random

from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.evals.rows import Examples

SEPARATOR = "\n\n"


class Shots(Config):
    """A shape: chooses examples for a question."""

    rows: Examples
    """Where the examples come from: a split that is not the tested one."""
    count: int = Field(5, ge=1)

    @abstractmethod
    def choose(self, pool: Sequence[str], index: int) -> list[str]:
        """`count` of the pool for question number `index`."""


class FirstShots(Shots):
    """The same first examples for all questions; their prefix is computed once for many."""

    def choose(self, pool: Sequence[str], index: int) -> list[str]:
        return list(pool[: self.count])


class RandomShots(Shots):
    """Others for each question; a question's shots depend on its number and the seed alone."""

    seed: int = 0

    def choose(self, pool: Sequence[str], index: int) -> list[str]:
        return Random(f"{self.seed}/{index}").sample(pool, self.count)


def before(shots: Shots | None, pool: Sequence[str], index: int, own: str) -> str:
    """The text of the shots, the question's own solution never among them."""
    if shots is None:
        return ""
    others = [shot for shot in pool if shot != own]
    if len(others) < shots.count:
        raise TreadleError(
            f"{shots.count} shots are wanted, but there are {len(others)} examples to choose from: "
            "lower `shots.count`, or give more rows"
        )
    return "".join(shot + SEPARATOR for shot in shots.choose(others, index))
