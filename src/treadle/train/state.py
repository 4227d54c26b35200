"""What a run is made of between two steps, and how tensors of any sharding go in and out.

On disk every tensor is whole: a run saved by 4 processes goes on with 1, and the reverse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from treadle.core.errors import TreadleError
from treadle.core.state import Stateful
from treadle.train.parallel import talk
from treadle.train.tree import owned


@dataclass(kw_only=True)
class TrainState:
    """Everything that a checkpoint keeps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Stateful
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    """Scaler, clipper, guard, random states, ...; each rank keeps its own."""
    config: str = ""
    """The run's YAML, kept beside the weights."""
    everything: bool = False
    """Keep frozen parameters too: for methods that rewrite them."""


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU of rank 0 (elsewhere an empty one); every rank must call."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return owned(full) if talk.rank() == 0 else torch.empty(0)


def like(full: Tensor, target: Tensor) -> Tensor:
    """A copy of `full`, on the device of `target` and sharded as it is; nobody communicates."""
    if not isinstance(target, DTensor):
        return full.to(target.device, copy=True)
    mesh, placements = target.device_mesh, target.placements
    whole_here = full.to(target.to_local().device)
    shards = distribute_tensor(whole_here, mesh, placements, src_data_rank=None)
    # A shard may be a view: it would keep the whole alive.
    return DTensor.from_local(
        shards.to_local().clone(),
        mesh,
        placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def model_tensors(state: TrainState) -> dict[str, Tensor]:
    """Parameters that train (or all) and persistent buffers, by name; tied ones once."""
    kept = {n: p for n, p in state.model.named_parameters() if p.requires_grad or state.everything}
    parameters = dict(state.model.named_parameters(remove_duplicate=False))
    seen = {id(p) for p in parameters.values()}
    buffers = {
        name: tensor
        for name, tensor in state.model.state_dict(keep_vars=True).items()
        if name not in parameters and id(tensor) not in seen and isinstance(tensor, Tensor)
    }
    return {**kept, **buffers}


def optimizer_tensors(state: TrainState) -> Iterator[tuple[str, str, nn.Parameter, Any]]:
    """(parameter name, key, parameter, value) of everything the optimiser remembers."""
    names = {id(p): n for n, p in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            assert name is not None, "the optimiser holds a parameter that the model lacks"
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim and not _follows(value, parameter):
                    raise TreadleError(
                        f"{type(state.optimizer).__name__} keeps `{key}` of `{name}` in another "
                        "shape than the sharded parameter's, which cannot be put together again; "
                        "use plan=DDP()"
                    )
                yield name, key, parameter, value


def _follows(value: Tensor, parameter: Tensor) -> bool:
    """Whether a state can be gathered and scattered: always, where nothing is sharded."""
    if not isinstance(parameter, DTensor):
        return True
    return isinstance(value, DTensor) and value.shape == parameter.shape


def optimizer_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Hyper-parameters of each group (some optimisers keep their progress there)."""
    return [
        {k: v for k, v in group.items() if k != "params" and _plain(v)}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def restore_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value


@torch.no_grad()
def put(target: Tensor, full: Tensor) -> None:
    """Overwrite a parameter or buffer with its share of `full`."""
    value = like(full, target)
    if isinstance(target, DTensor) and isinstance(value, DTensor):
        target.to_local().copy_(value.to_local())
    else:
        target.copy_(value)


def frozen_fingerprints(state: TrainState) -> dict[str, list[Any]]:
    """Shape, dtype and a hash of a sample of each parameter that a checkpoint does not hold.

    Adapters saved on one base model must not go on with another of the same shapes. Right on
    rank 0 only; every rank must call.
    """
    kept = model_tensors(state)
    prints = {}
    for name, parameter in state.model.named_parameters():
        if name not in kept:
            flat = whole(parameter).flatten()
            sample = owned(flat[:: max(1, flat.numel() // 1024)]).view(torch.uint8)
            digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
            prints[name] = [list(parameter.shape), str(parameter.dtype), digest]
    return prints
