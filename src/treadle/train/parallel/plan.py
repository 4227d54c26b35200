"""Plans: how one run is spread over processes. One process is the size-1 case of many.

A step is the same for any number of ranks: each sums the gradients of its own micro-batches, the
plan sums over ranks, and the loop divides once by the weight of all. So 2 ranks equal 1.

    world = plan.setup(device)
    plan.wrap(model)                            # before the optimiser is built
    for i in range(plan.rounds(len(batches))):
        plan.begin(model, last=...)
        ... forward and backward of batch i, or, where there is none, of any batch times zero
    plan.finish(model)                          # now p.grad is the sum over all ranks
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.train.parallel import talk
from treadle.train.tree import owned


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device


class Plan(Config):
    """A shape: who holds what, and when it is summed."""

    @abstractmethod
    def setup(self, device: str = "") -> World:
        """Join the other processes. `device` as `cpu` or `cuda`; empty: an accelerator if any."""

    @abstractmethod
    def wrap(self, model: nn.Module) -> None:
        """Spread the model, in place; it keeps its type, attributes and parameter names."""

    @abstractmethod
    def begin(self, model: nn.Module, *, last: bool) -> None:
        """Before each micro-batch; `last` says that `finish` follows it."""

    @abstractmethod
    def finish(self, model: nn.Module) -> None:
        """After the last backward of a step: gradients become sums over all ranks."""

    @abstractmethod
    def rounds(self, batches: int) -> int:
        """How many times this rank goes through forward and backward in this step.

        Sharded plans talk in every pass, so all ranks make as many as the one with the most.
        """

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks, in place."""
        if talk.world_size() > 1:
            dist.all_reduce(value)
        return value

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict on the CPU of rank 0, empty elsewhere; every rank calls."""
        state = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if talk.rank() == 0:
                state[name] = owned(full)
        return state

    def barrier(self) -> None:
        """Wait for the others."""
        talk.from_first("")

    def close(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


class SingleProcess(Plan):
    """One process, one device."""

    def setup(self, device: str = "") -> World:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise TreadleError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, but the plan is "
                "SingleProcess, so each would train the same; set plan to DDP or FSDP"
            )
        return World(rank=0, size=1, device=pick_device(device))

    def wrap(self, model: nn.Module) -> None:
        return

    def rounds(self, batches: int) -> int:
        return batches

    def begin(self, model: nn.Module, *, last: bool) -> None:
        return

    def finish(self, model: nn.Module) -> None:
        return


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The named device, or the accelerator of this process if there is one, else the CPU."""
    if device == "cpu" or (not device and not torch.accelerator.is_available()):
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        raise TreadleError(f"device `{device}` is not there; use `cpu`")
    kind = device.partition(":")[0] or torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    chosen = torch.device(device if ":" in device else f"{kind}:{local_rank}")
    torch.accelerator.set_device_index(chosen.index)
    return chosen


def join(device: str) -> World:
    """Join the processes that torchrun started; alone where it did not start this one."""
    env = os.environ
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    chosen = pick_device(device, int(env.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo" if chosen.type == "cpu" else f"cpu:gloo,{chosen.type}:nccl"
    if not dist.is_initialized():
        store = None if size > 1 else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=rank, world_size=size, store=store)
    return World(rank=rank, size=size, device=chosen)
