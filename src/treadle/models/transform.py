"""Transforms: what rewrites a model from outside, `Model -> Model`.

Adapters, quantisation, pruning and activation checkpointing are all transforms. They find their
targets by module name; a pattern that matches nothing is an error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from treadle.core.config import Config
from treadle.core.errors import ConfigError, did_you_mean

M = TypeVar("M", bound=nn.Module)


class Transform(Config):
    """A shape: rewrites a model in place and returns it.

    A transform that trains parts of the model sets `requires_grad` on every parameter: frozen
    where it does not train.
    """

    @abstractmethod
    def __call__(self, model: M) -> M:
        """The rewritten model."""


def transformed(model: M, transforms: Sequence[Transform]) -> M:
    """The model, rewritten by one after the other."""
    for transform in transforms:
        model = transform(model)
    return model


def match_modules(
    model: nn.Module, patterns: Sequence[str], kinds: tuple[type[nn.Module], ...], *, owner: str
) -> dict[str, nn.Module]:
    """Modules of the given kinds whose dotted name matches a pattern (`blocks.*.mixer.q`).

    A pattern matches the whole name, or its end after a dot: `q` matches `blocks.0.mixer.q`.

    Raises:
        ConfigError: a pattern matches nothing; names what is near.
    """
    modules = {n: m for n, m in model.named_modules() if n and isinstance(m, kinds)}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = [n for n in modules if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not hits:
            ends = {n.rsplit(".", 1)[-1] for n in modules}
            raise ConfigError(
                f"{owner}: target `{pattern}` matches no layer{did_you_mean(pattern, ends)}"
            )
        found.update((n, modules[n]) for n in hits)
    return {n: m for n, m in modules.items() if n in found}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the dotted `name` points."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
