"""What a merge of models is: one formula for every tensor, over models of one shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import ConfigError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """One tensor of all models, in fp32."""

    name: str
    base: Float[Tensor, "..."] | None
    """Of the model that all were tuned from."""
    tensors: Sequence[Float[Tensor, "..."]]


class MergeMethod(Config):
    """A shape: how tensors become one."""

    @abstractmethod
    def check(self, count: int, *, has_base: bool) -> None:
        """Raise ConfigError where this many models, with or without a base, cannot be merged."""

    @abstractmethod
    def __call__(self, parts: Parts) -> Float[Tensor, "..."]:
        """The merged tensor."""


@torch.no_grad()
def merge_states(
    method: MergeMethod, states: Sequence[State], base: State | None = None
) -> dict[str, Tensor]:
    """The merged parameters, by name; fp32 arithmetic, then the dtype of the first model.

    Raises:
        ConfigError: models of different shapes, too few of them, or no base where one is needed.
    """
    if not states:
        raise ConfigError("nothing to merge: name at least one model")
    method.check(len(states), has_base=base is not None)
    first = states[0]
    others = {f"model {place}": state for place, state in enumerate(states[1:], 2)}
    for whose, state in (others | ({} if base is None else {"the base": base})).items():
        _same_shape(first, state, whose)
    return {
        name: method(
            Parts(
                name,
                None if base is None else base[name].float(),
                [state[name].float() for state in states],
            )
        ).to(first[name].dtype)
        for name in first
    }


def weights_of(weights: tuple[float, ...], count: int, owner: str) -> tuple[float, ...]:
    """A weight for each model; all 1 where none are given.

    Raises:
        ConfigError: another number of weights than models.
    """
    if weights and len(weights) != count:
        raise ConfigError(f"{owner}: {len(weights)} weights for {count} models; give one each")
    return weights or (1.0,) * count


def _same_shape(first: State, other: State, whose: str) -> None:
    if odd := sorted(set(first) ^ set(other)):
        has, lacks = ("model 1", whose) if odd[0] in first else (whose, "model 1")
        raise ConfigError(
            f"models of different shapes cannot be merged: {has} has `{odd[0]}` and {lacks} does "
            "not; take models of one architecture, tuned from one base"
        )
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise ConfigError(
                f"models of different shapes cannot be merged: `{name}` is {tuple(tensor.shape)} "
                f"in model 1 and {tuple(other[name].shape)} in {whose}; take models of one "
                "architecture, tuned from one base"
            )
