"""Data parallel with replicas: every rank holds all of the model, gradients are summed.

Gradients are laid end to end in flat buckets; while one bucket travels the next is filled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.train.parallel import talk
from treadle.train.parallel.plan import Plan, World, join

BUCKET_ELEMENTS = 4 * 2**20
"""16 MiB of fp32 gradients a message."""


class DDP(Plan):
    """Distributed data parallel."""

    def setup(self, device: str = "") -> World:
        return join(device)

    @torch.no_grad()
    def wrap(self, model: nn.Module) -> None:
        if talk.world_size() == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def rounds(self, batches: int) -> int:
        return batches

    def begin(self, model: nn.Module, *, last: bool) -> None:
        return

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        if talk.world_size() == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        # A parameter without gradient on one rank (an expert that met no token) counts as zero;
        # without any, it stays without, as it would in one process.
        device = parameters[0].device
        present = torch.tensor([p.grad is not None for p in parameters], device=device).int()
        dist.all_reduce(present)
        used = [p for p, n in zip(parameters, present.tolist(), strict=True) if n]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sent = []
        for bucket in _buckets([p.grad for p in used if p.grad is not None]):
            flat = torch.cat([g.flatten() for g in bucket])
            sent.append((dist.all_reduce(flat, async_op=True), flat, bucket))
        for work, flat, bucket in sent:
            work.wait()
            for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, of about BUCKET_ELEMENTS each."""
    bucket: list[Tensor] = []
    for grad in grads:
        full = sum(g.numel() for g in bucket) + grad.numel() > BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != grad.dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
