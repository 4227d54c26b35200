"""The two modes of a module: training, and evaluating, which is without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout meanwhile; then as it was, whatever happened."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
