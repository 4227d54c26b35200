"""Where kernels in Triton can run."""

from __future__ import annotations

import torch
from triton import knobs

from treadle.core.errors import TreadleError


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the processor, slowly and readably."""
    return bool(knobs.runtime.interpret)


def check(device: torch.device, owner: str) -> None:
    """
    Raises:
        TreadleError: kernels cannot run on tensors there.
    """
    if device.type != "cuda" and not interpreted():
        raise TreadleError(
            f"{owner} run on a GPU, and the tensors are on {device}: leave them out there"
        )
