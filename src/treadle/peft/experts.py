"""Experts: adapters that were trained apart, brought together on one base, and frozen there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.peft.adapter import AdapterLayer, adapted, remove
from treadle.peft.files import SAME_BASE, sample

Expert = Mapping[str, AdapterLayer]
"""Layers by the names of what they adapt; all that they learned is theirs, their base may be shared
with other experts."""


def open_experts(
    sources: Sequence[ModelSource], workspace: Workspace, owner: str
) -> tuple[Opened, list[Expert]]:
    """The base of adapted models without adapters, and what each of them learned.

    Raises:
        ConfigError: a model has no adapters, or another base than the first.
    """
    first: Opened | None = None
    experts: list[Expert] = []
    for place, source in enumerate(sources, 1):
        opened = source.open(workspace)
        layers = adapted(opened.model)
        if not layers:
            raise ConfigError(
                f"{owner}: model {place} has no adapters; name models that were trained with some"
            )
        remove(opened.model)
        if first is None:
            first = opened
        else:
            check_same_base(first.model, opened.model, owner, place)
            for name, layer in layers.items():  # its own copy of the base is not needed any more
                layer.base = first.model.get_submodule(name)
        experts.append(layers)
    assert first is not None
    return replace(first, bytes_on_disk=None), experts


@torch.no_grad()
def check_same_base(first: DecoderModel, other: DecoderModel, owner: str, place: int) -> None:
    """Raise ConfigError where two models differ in more than rounding."""
    theirs = dict(other.named_parameters())
    for name, parameter in first.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ConfigError(
                f"{owner}: model {place} is of another shape than the first (`{name}` differs); "
                "bring together adapters of one base"
            )
    here, there = sample(first.embedding.weight), sample(other.embedding.weight)
    difference = float((here - there).norm() / here.norm().clamp(min=1e-12))
    if not difference <= SAME_BASE:
        raise ConfigError(
            f"{owner}: the adapter of model {place} was trained on another base: its embeddings "
            f"differ from the first's by {difference:.0%}; bring together adapters of one base"
        )


def buffered(module: nn.Module) -> nn.Module:
    """The module with buffers in the place of parameters: nothing ever trains them."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
