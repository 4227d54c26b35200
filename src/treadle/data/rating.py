"""The shape of whatever rates answers: rules, reward models, several of them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.core.config import Config
from treadle.data.records import Problem
from treadle.data.source import Env


@dataclass(frozen=True)
class Scored:
    """A reward, and where it comes from."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """By name, where several are weighed."""
    failure: str = ""
    """What went wrong with the verifier; the value is 0 then."""


Rater = Callable[[Problem, Sequence[str]], list[Scored]]
"""Rates several answers to one problem."""


class Rating(Config):
    """A shape: how good answers are, each between 0 and 1."""

    @abstractmethod
    def open(self, env: Env, patience: float) -> Rater:
        """Called once, before the first answer.

        Args:
            patience: seconds after which a rule is given up, for each answer.
        """
