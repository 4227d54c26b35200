"""Activation checkpointing: trade time for the memory of what backward needs.

    Recompute            keeps only each block's input and computes the block again in backward
                         (Chen et al. 2016): memory falls from all activations to those of one
                         block, for about a third more compute
    SelectiveRecompute   also keeps the results of matrix products and attention, and recomputes
                         the cheap rest: norms, activations, products (Korthikanti et al. 2022)
    OffloadActivations   keeps everything, in the memory of the CPU

A block keeps its type, its parameter names and its place in the model. Without gradients it runs
as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.transform import M, Transform
from treadle.nn.block import BlockLayer

CARD = Card(
    id="opt.checkpointing",
    paper="Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198",
    summary="Recomputes activations in backward, all or the cheap ones, or moves them to the CPU.",
    recipe="treadle run quickstart-scratch steps.1.transforms='[{kind: Recompute}]'",
    oracle="tests/train/test_train_recompute.py::test_gradients_are_equal_bit_for_bit",
)


class Recompute(Transform):
    """Computes whole blocks again."""

    every: int = Field(default=1, ge=1)
    """Every which block: 2 leaves each second block as it is."""

    def __call__(self, model: M) -> M:
        wrap_blocks(model, self.every, FullForward, type(self).__name__)
        return model


class SelectiveRecompute(Transform):
    """Keeps matrix products and attention, computes the rest again."""

    every: int = Field(default=1, ge=1)

    def __call__(self, model: M) -> M:
        wrap_blocks(model, self.every, SelectiveForward, type(self).__name__)
        return model


class OffloadActivations(Transform):
    """Moves what backward needs to the CPU and back."""

    every: int = Field(default=1, ge=1)
    least: int = Field(default=2**20, ge=0)
    """Bytes below which a tensor stays where it is."""

    def __call__(self, model: M) -> M:
        forward = partial(OffloadForward, least=self.least)
        wrap_blocks(model, self.every, forward, type(self).__name__)
        return model


class BlockForward(ABC):
    """Stands in for a block's `forward`. An object, not a closure: a copied model has its own."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return self.train(plain, *args, **kwargs)

    @abstractmethod
    def train(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `plain` so that backward finds what it needs."""


class FullForward(BlockForward):
    def train(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)


class SelectiveForward(BlockForward):
    def train(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class OffloadForward(BlockForward):
    def __init__(self, block: nn.Module, least: int) -> None:
        super().__init__(block)
        self.least = least

    def train(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with offloading(self.least):
            return plain(*args, **kwargs)


def wrap_blocks(
    model: nn.Module, every: int, forward: Callable[[nn.Module], BlockForward], owner: str
) -> None:
    blocks = [m for m in model.modules() if isinstance(m, BlockLayer)]
    if not blocks:
        raise ConfigError(f"{owner}: {type(model).__name__} has no blocks to recompute")
    for block in blocks[::every]:
        # An instance's attribute hides the class's method and leaves names and type alone.
        vars(block)["forward"] = forward(block)


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What a selective checkpoint saves: results that took far more work than memory."""
    return CheckpointPolicy.MUST_SAVE if op in _products() else CheckpointPolicy.PREFER_RECOMPUTE


def _products() -> Sequence[Any]:
    aten = torch.ops.aten
    return (
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    )


def offloading(least: int) -> AbstractContextManager[Any]:
    """Within it, large activations that autograd saves are kept in CPU memory."""

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        # Parameters stay: they are on the device anyway.
        small = tensor.nbytes < least or isinstance(tensor, nn.Parameter)
        if small or tensor.device.type == "cpu":
            return tensor.device, tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return tensor.device, kept.copy_(tensor, non_blocking=False)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
