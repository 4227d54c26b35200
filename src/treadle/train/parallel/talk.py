"""What processes of a run tell each other besides tensors; with one process, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from treadle.core.errors import TreadleError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_bytes(data: bytes) -> list[bytes]:
    """The data of every rank, in order, on rank 0; on the others an empty list."""
    if world_size() == 1:
        return [data]
    gathered: list[bytes] | None = [b""] * world_size() if rank() == 0 else None
    dist.gather_object(data, gathered)
    return gathered or []


def from_first(text: str) -> str:
    """What rank 0 says, on all ranks."""
    if world_size() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed(*values: float) -> tuple[float, ...]:
    """Each of the values, summed over all ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return tuple(total.tolist())


@contextmanager
def first_rank_works() -> Iterator[bool]:
    """Yields whether this is rank 0; all wait for it, and where it fails, all fail.

    The body must do its work only where the value is True, and must not communicate.
    """
    error: Exception | None = None
    try:
        yield rank() == 0
    except Exception as failure:
        error = failure
    told = from_first("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    if told:
        raise TreadleError(f"rank 0 failed: {told}")
