"""Which parameters weight decay pulls towards zero."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from treadle.core.config import Config


class DecayRule(Config):
    """A shape: decides for each parameter."""

    @abstractmethod
    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter called `name` decays."""


class DecayMatrices(DecayRule):
    """Weights of two and more dimensions, except embeddings.

    Norm gains and biases are no directions in weight space, and an embedding row that is rarely
    seen would decay with no gradient to answer. A head tied to its embedding counts as embedding.
    """

    embeddings: tuple[str, ...] = ("embedding", "position")
    """Module names, any part of the dotted path, whose weights never decay."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not set(self.embeddings) & set(name.split("."))


class DecayAll(DecayRule):
    """Every parameter."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return True


def decay_groups(
    parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float, rule: DecayRule
) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimiser: those that decay, then those that do not."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        decay = weight_decay if rule.decays(name, parameter) else 0.0
        groups.setdefault(decay, []).append(parameter)
    return [
        {"params": groups[decay], "weight_decay": decay} for decay in sorted(groups, reverse=True)
    ]
