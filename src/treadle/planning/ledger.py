"""A ledger of memory: which bytes are alive while torch works on tensors that have none.

Under `FakeTensorMode` every operation gives a tensor with shape, dtype and device and no numbers.
The ledger books the storage of each when it appears and strikes it out when nobody holds it any
more, so that the highest sum is what the same work needs with numbers in it: weights, what autograd
keeps, gradients, optimiser states and each short-lived result between them. Floating-point
operations are counted on the way.

What depends on numbers cannot be known: a test (`isfinite().all()`) is taken as true, and a number
as one. Tensors that have numbers (positions, masks of a batch) are worked with as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from treadle.planning.heap import Requests


class Ledger(TorchDispatchMode):
    """Bytes alive now and at the highest, floating-point operations so far, and every request for
    memory."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self.requests = Requests()
        self._booked: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(given[0]):
            return given[0].dtype == torch.bool or 1
        if given and not any(map(_is_fake, given)):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self.flops += _flops(getattr(func, "overloadpacket", func), args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        return result

    def mark(self) -> None:
        """Begin the search for the highest anew."""
        self.peak = self.alive

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._booked:
            return
        self._booked.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        number = self.requests.ask(size) if size else 0
        weakref.finalize(storage, self._strike, key, size, number)

    def _strike(self, key: int, size: int, number: int) -> None:
        self._booked.discard(key)
        self.alive -= size
        if number:
            self.requests.give_back(number)


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of torch's formulas; of the CPU's attention, for which it has none, the products."""
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        q, k, v = args[:3]
        return _attention_flops(q, k, q.shape[-1] + v.shape[-1], causal=(*args, 0, 0)[4])
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        q, k, v = args[1:4]
        return _attention_flops(q, k, 3 * q.shape[-1] + 2 * v.shape[-1], causal=args[7])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _attention_flops(q: Tensor, k: Tensor, width: int, *, causal: bool) -> int:
    """Of products that are so wide together; the kernel leaves out what causality hides."""
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2 * pairs * width // (2 if causal else 1)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


@contextmanager
def rehearsing() -> Iterator[Ledger]:
    """Within it, torch works without numbers, and a ledger counts.

    Not for two at once: it changes how modules move, for all of the process.
    """
    move = nn.Module.to
    nn.Module.to = _move  # type: ignore[method-assign,assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
            yield ledger
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`module.to`, parameter by parameter: torch would swap them, which those without numbers
    refuse."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for tensor in (*module.parameters(), *module.buffers()):
        wanted = dtype if tensor.is_floating_point() else None
        if (device and device != tensor.device) or (wanted and wanted != tensor.dtype):
            tensor.data = tensor.data.to(device=device, dtype=wanted or tensor.dtype)
    return module
