"""Memory for results of the same size, again and again."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


class Recycled:
    """Gives out memory that nobody holds any more, before it asks for new one.

    Megabytes that are freed go back to the system, which hands them out again page by page, each
    with a fault and zeroed: that took a fifth of a pass with many logits.
    """

    def __init__(self) -> None:
        self._given: list[tuple[Tensor, Callable[[], NDArray[np.float32] | None]]] = []

    def take(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """A tensor with whatever is in it. It is its holder's until its last view is gone."""
        size = rows * columns
        free = [memory for memory, holder in self._given if holder() is None]
        self._given = [(memory, holder) for memory, holder in self._given if holder() is not None]
        memory = next((m for m in free if size <= len(m) <= 4 * size), None)
        if memory is None:
            memory = torch.empty(size)
        view = memory.numpy()[:size]  # the tensor made from it is what keeps it alive
        self._given.append((memory, weakref.ref(view)))
        return torch.from_numpy(view).view(rows, columns)
