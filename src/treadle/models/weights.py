"""Weight tables: which tensors of a foreign checkpoint make which of ours, in both directions.

A table is a tuple of rules. Most rename; some also transpose, split, shift or reorder, always by
a map with an exact inverse, so that one table reads and writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class TensorMap(ABC):
    """Their tensors to ours, and back."""

    @abstractmethod
    def read(self, theirs: Tensors) -> Tensors:
        """Our tensors."""

    @abstractmethod
    def write(self, ours: Tensors) -> Tensors:
        """Their tensors; the inverse of `read`."""


@dataclass(frozen=True)
class Same(TensorMap):
    """One tensor as it is."""

    def read(self, theirs: Tensors) -> Tensors:
        return theirs

    def write(self, ours: Tensors) -> Tensors:
        return ours


@dataclass(frozen=True)
class Transposed(TensorMap):
    """Matrices stored `[in, out]`."""

    def read(self, theirs: Tensors) -> Tensors:
        return tuple(t.T for t in theirs)

    def write(self, ours: Tensors) -> Tensors:
        return tuple(t.T for t in ours)


@dataclass(frozen=True)
class Fused(TensorMap):
    """Several of ours stacked along their rows into one of theirs, such as q, k and v."""

    rows: tuple[int, ...]

    def read(self, theirs: Tensors) -> Tensors:
        (fused,) = theirs
        parts: Tensors = fused.split(self.rows)
        return parts

    def write(self, ours: Tensors) -> Tensors:
        return (torch.cat(ours),)


@dataclass(frozen=True)
class Stacked(TensorMap):
    """Several of theirs lie behind each other in one of ours, such as the experts of a layer."""

    def read(self, theirs: Tensors) -> Tensors:
        return (torch.stack(theirs),)

    def write(self, ours: Tensors) -> Tensors:
        (stacked,) = ours
        return stacked.unbind(0)


@dataclass(frozen=True)
class Squeezed(TensorMap):
    """A matrix of one row is a vector of theirs."""

    def read(self, theirs: Tensors) -> Tensors:
        return tuple(t.unsqueeze(0) for t in theirs)

    def write(self, ours: Tensors) -> Tensors:
        return tuple(t.squeeze(0) for t in ours)


@dataclass(frozen=True)
class Shifted(TensorMap):
    """theirs = ours + by: GGUF keeps Gemma's norms as 1 + w."""

    by: float

    def read(self, theirs: Tensors) -> Tensors:
        return tuple(t - self.by for t in theirs)

    def write(self, ours: Tensors) -> Tensors:
        return tuple(t + self.by for t in ours)


@dataclass(frozen=True)
class Interleaved(TensorMap):
    """Rows of each head reordered so that the halves which RoPE pairs lie next to each other.

    GGUF's llama architecture pairs (x_2i, x_2i+1) where we pair (x_i, x_i+D/2).
    """

    heads: int

    def read(self, theirs: Tensors) -> Tensors:
        return tuple(self._swapped(t, (self.heads, -1, 2)) for t in theirs)

    def write(self, ours: Tensors) -> Tensors:
        return tuple(self._swapped(t, (self.heads, 2, -1)) for t in ours)

    def _swapped(self, tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
        swapped: Tensor = tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2)
        return swapped


@dataclass(frozen=True)
class Chain(TensorMap):
    """One map after another, in reading order."""

    maps: tuple[TensorMap, ...]

    def read(self, theirs: Tensors) -> Tensors:
        for step in self.maps:
            theirs = step.read(theirs)
        return theirs

    def write(self, ours: Tensors) -> Tensors:
        for step in reversed(self.maps):
            ours = step.write(ours)
        return ours


@dataclass(frozen=True)
class Rule:
    """These tensors of theirs hold those of ours. `{i}` in a name stands for the layer."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    map: TensorMap = Same()

    def at(self, layer: int) -> Rule:
        """The rule of one layer."""
        return Rule(
            tuple(n.replace("{i}", str(layer)) for n in self.theirs),
            tuple(n.replace("{i}", str(layer)) for n in self.ours),
            self.map,
        )


def rule(theirs: str, ours: str | Sequence[str], map: TensorMap = Same()) -> Rule:
    """A rule about one tensor of theirs."""
    return Rule((theirs,), (ours,) if isinstance(ours, str) else tuple(ours), map)


def expand(rules: Iterable[Rule], layers: int) -> tuple[Rule, ...]:
    """Every rule that speaks of `{i}`, once for each layer."""
    expanded: list[Rule] = []
    for item in rules:
        each = any("{i}" in name for name in item.ours)
        expanded += [item.at(layer) for layer in range(layers)] if each else [item]
    return tuple(expanded)
