"""Sharded data parallel (ZeRO, Rajbhandari et al. 2020), by torch's `fully_shard`.

    stage   each rank holds its share of        between forward and backward a rank holds
      1     optimiser states                    all weights and all gradients
      2     optimiser states, gradients         all weights
      3     optimiser states, gradients, weights    the weights of one block

The shards of a block are gathered when the block runs, and its gradients are summed (not
averaged: the loop divides by the weight of the whole step) and scattered after its backward.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.block import BlockLayer
from treadle.train.parallel import talk
from treadle.train.parallel.plan import Plan, World, join

CARD = Card(
    id="par.data",
    paper="Li et al. 2020, arXiv:2006.15704; Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; "
    "Zhao et al. 2023, FSDP, arXiv:2304.11277",
    summary="Data parallel: replicas (DDP), ZeRO 1 to 3, hybrid shards, weights kept on the CPU.",
    recipe="torchrun --nproc-per-node=2 -m treadle run quickstart-scratch "
    "steps.1.plan='{kind: FSDP}'",
    oracle="tests/train/test_train_parallel.py::test_two_ranks_equal_one",
)


class FSDP(Plan):
    """Fully sharded data parallel."""

    stage: Literal[1, 2, 3] = 3
    offload: bool = False
    """Keep the shards in CPU memory while they are not needed."""
    replicas: int = Field(default=1, ge=1)
    """Groups of ranks that each hold the whole model between them (hybrid sharding)."""

    def setup(self, device: str = "") -> World:
        world = join(device)
        if world.size % self.replicas:
            raise ConfigError(f"FSDP: replicas={self.replicas} must divide {world.size} processes")
        return world

    def wrap(self, model: nn.Module) -> None:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        device = next(model.parameters()).device.type
        shards = talk.world_size() // self.replicas
        shape, names = (
            ((shards,), ("shard",))
            if self.replicas == 1
            else ((self.replicas, shards), ("replicate", "shard"))
        )
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        pinned = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
        offload = pinned if self.offload else OffloadPolicy()
        reshard = self.stage == 3
        blocks = [m for m in model.modules() if isinstance(m, BlockLayer)]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload)
        # The root holds embedding and head, which objectives use after the forward pass.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def rounds(self, batches: int) -> int:
        most = torch.tensor(batches)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def begin(self, model: nn.Module, *, last: bool) -> None:
        assert isinstance(model, FSDPModule), "wrap comes first"
        if self.stage == 1:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)

    def finish(self, model: nn.Module) -> None:
        return
