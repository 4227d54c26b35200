"""Filling a model from a checkpoint and emptying it into one, rule by rule.

Names and shapes are checked before a single weight is read. Weights are read one rule at a time,
straight into a model built without memory, so that the peak is the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from treadle.core.errors import ConfigError, FileFormatError
from treadle.models.decoder import DecoderModel
from treadle.models.outline import outline
from treadle.models.weights import Rule

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """The part of a parameter that is wanted."""

    dim: int
    own: slice


Part = Callable[[Rule, int, Cut], Tensor]
"""Of a rule's parameter of this number, the part; read without the rest of it."""


def applicable(model: nn.Module, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules whose parameters the model has.

    Raises:
        ConfigError: a parameter has none, so the table's family is not the model's.
    """
    parameters = {name for name, _ in model.named_parameters()}
    used = tuple(rule for rule in rules if parameters.issuperset(rule.ours))
    ruled = {name for rule in used for name in rule.ours}
    if ruled != parameters:
        raise ConfigError(f"the family has no place for {_some(sorted(parameters - ruled))}")
    return used


def require_plain(model: DecoderModel) -> None:
    """Raise where a transform has changed what parameters the model has.

    Raises:
        ConfigError: names the parameters that are new, or gone.
    """
    fresh = {name for name, _ in outline(model.config).named_parameters()}
    found = {name for name, _ in model.named_parameters()}
    if changed := sorted(found - fresh) or sorted(fresh - found):
        is_new = bool(found - fresh)
        raise ConfigError(
            f"the model {'has' if is_new else 'lacks'} {_some(changed)}, "
            f"which its config {'does not have' if is_new else 'has'}; "
            "merge adapters, and take off heads and other transforms, first"
        )


def expected_shapes(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    parameters = dict(model.named_parameters())
    shapes: dict[str, Shape] = {}
    for rule in rules:
        ours = tuple(torch.empty(parameters[n].shape, device="meta") for n in rule.ours)
        for name, tensor in zip(rule.theirs, rule.map.write(ours), strict=True):
            shapes[name] = tuple(tensor.shape)
    return shapes


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """Compare what a checkpoint should hold with what it holds; `where` begins the message.

    Raises:
        FileFormatError: tensors are missing, left over, or of another shape; names them.
    """
    faults = []
    if missing := [n for n in expected if n not in found]:
        faults.append(f"lacks {_some(missing)}")
    if extra := [n for n in found if n not in expected]:
        faults.append(f"holds {_some(extra)}, for which the model has no place")
    for name in expected:
        if name in found and expected[name] != found[name]:
            faults.append(f"has {name} of shape {found[name]}, not {expected[name]}")
    if faults:
        raise FileFormatError(f"{where}: it " + "; ".join(faults))


def ignore(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that match no pattern."""
    return tuple(n for n in names if not any(fnmatchcase(n, p) for p in patterns))


def fill(
    model: nn.Module,
    rules: Sequence[Rule],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    cuts: Mapping[str, Cut] = MappingProxyType({}),
    part: Part | None = None,
) -> None:
    """Give a model on the meta device its weights; tied parameters stay one.

    Args:
        dtype: of the parameters; None keeps that of the checkpoint.
        cuts: parameters of which the model has a part only.
        part: reads such a part; None: it is cut from what `read` gives.
    """
    part = part or partial(_cut, read)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            places.setdefault(names[id(parameter)], []).append((module, leaf))
    for rule in rules:
        if cuts.keys().isdisjoint(rule.ours):
            ours = rule.map.read(tuple(read(name) for name in rule.theirs))
        else:
            ours = tuple(part(rule, i, cuts[name]) for i, name in enumerate(rule.ours))
        for name, tensor in zip(rule.ours, ours, strict=True):
            # A part of a tensor is copied, lest it keep the whole in memory.
            part_of_more = tensor.untyped_storage().nbytes() > tensor.nbytes
            copy = part_of_more and (len(ours) > 1 or name in cuts)
            own = tensor.to(device, dtype or tensor.dtype, copy=copy).contiguous()
            parameter = nn.Parameter(own)
            for module, leaf in places[name]:
                setattr(module, leaf, parameter)


def _cut(read: Callable[[str], Tensor], rule: Rule, index: int, cut: Cut) -> Tensor:
    whole = rule.map.read(tuple(read(name) for name in rule.theirs))[index]
    return whole.narrow(cut.dim, cut.own.start, cut.own.stop - cut.own.start)


def spill(
    model: nn.Module, rules: Sequence[Rule], packed: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint of a model, under their names.

    `packed` has bytes for some parameters; maps that only move rows carry them over.
    """
    parameters = {**dict(model.named_parameters()), **packed}
    for rule in rules:
        theirs = rule.map.write(tuple(parameters[n].detach() for n in rule.ours))
        yield from zip(rule.theirs, theirs, strict=True)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
