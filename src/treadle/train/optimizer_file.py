"""An optimiser's memory in a checkpoint: tensors as `<parameter>/<key>`, all else as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.train.state import (
    TrainState,
    like,
    optimizer_groups,
    optimizer_tensors,
    restore_groups,
    whole,
)
from treadle.train.tree import join, split


def optimizer_to_disk(state: TrainState) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, key, _, value in optimizer_tensors(state):
        if isinstance(value, Tensor):
            tensors[f"{name}/{key}"] = whole(value)
        else:
            scalars.setdefault(name, {})[key] = value
    tree = {"scalars": scalars, "groups": optimizer_groups(state.optimizer)}
    kind = type(state.optimizer).__name__
    return tensors, {"kind": kind, "tree": json.dumps(split(tree, {}), allow_nan=False)}


def optimizer_from_disk(file: Path, state: TrainState) -> None:
    parameters = dict(state.model.named_parameters())
    memory: dict[str, dict[str, Any]] = {}
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        kind = type(state.optimizer).__name__
        if metadata["kind"] != kind:
            raise TreadleError(f"{file}: state of {metadata['kind']}, but the run uses {kind}")
        tree = join(json.loads(metadata["tree"]), {})
        if len(tree["groups"]) != len(state.optimizer.param_groups):
            raise TreadleError(f"{file}: the optimiser's parameter groups differ")
        for path in content.keys():  # noqa: SIM118  (not a mapping)
            name, _, key = path.rpartition("/")
            memory.setdefault(name, {})[key] = content.get_tensor(path)
    for name, scalars in tree["scalars"].items():
        memory.setdefault(name, {}).update(scalars)
    fused = any(group.get("fused") for group in state.optimizer.param_groups)
    state.optimizer.state.clear()
    for name, values in memory.items():
        parameter = parameters[name]
        state.optimizer.state[parameter] = {
            key: _placed(value, parameter, fused) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    restore_groups(state.optimizer, tree["groups"])


def _placed(value: Tensor, parameter: Tensor, fused: bool) -> Tensor:
    if value.ndim == 0:  # a step count: torch keeps it on the CPU unless the optimiser is fused
        return value.to(parameter.device) if fused else value
    return like(value, parameter)
