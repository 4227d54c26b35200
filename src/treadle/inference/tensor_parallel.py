"""Tensor-parallel inference: one process schedules, all compute each pass on their part.

Process 0 has the engine. It tells the others what the pass is (tokens, pages: some hundred bytes)
and all run it together; no other process schedules, samples or sees a request, so none can differ.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.inference.cache import Cache
from treadle.inference.paged_memory import Paged
from treadle.inference.runner import Batch, Name, Runner
from treadle.inference.shards import shard
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel

CARD = Card(
    id="inf.parallel",
    paper="Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053",
    summary="A model cut over processes by heads, hidden units and vocabulary.",
    recipe="torchrun --nproc-per-node=2 -m treadle generate smollm2-135m-instruct 'The loom was' "
    "--tensor-parallel 2",
    oracle="tests/inference/test_inference_parallel.py::test_two_ranks_equal_one",
)


def join(size: int, device: str = "cpu") -> tuple[int, torch.device]:
    """Meet the other processes that torchrun started; this one's rank and device.

    Raises:
        TreadleError: torchrun started another number, or none.
    """
    env = os.environ
    started = int(env.get("WORLD_SIZE", "1"))
    if started != size:
        raise TreadleError(
            f"a model over {size} processes, but {started} run: start it by "
            f"`torchrun --nproc-per-node={size} -m treadle ...`"
        )
    chosen = torch.device(device if device == "cpu" else f"{device}:{env.get('LOCAL_RANK', '0')}")
    backend = "gloo" if chosen.type == "cpu" else f"cpu:gloo,{chosen.type}:nccl"
    # those who follow wait for the next request as long as it takes
    dist.init_process_group(backend, timeout=timedelta(days=365))
    return dist.get_rank(), chosen


class TensorParallelRunner(Runner):
    """The runner of process 0; the others are in `follow`. Close it to let them go.

    Args:
        model: whole, the same in every process; this one's part is kept.
    """

    def __init__(
        self, model: DecoderModel, *, pages: int, page: int = 16, cache: Cache = Paged()
    ) -> None:
        model = shard(model, dist.get_rank(), dist.get_world_size())
        self.inner = TorchRunner(model, pages=pages, page=page, cache=cache)
        self.page, self.pages, self.lasting = page, pages, self.inner.lasting
        self.vocab, self.context = self.inner.vocab, self.inner.context
        _tell({"pages": pages, "page": page})

    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        _tell({"run": asdict(batch)})
        return self.inner.run(batch)

    def copy(self, source: int, target: int) -> None:
        _tell({"copy": [source, target]})
        self.inner.copy(source, target)

    def fork(self, name: Name, other: Name) -> None:
        _tell({"fork": [name, other]})
        self.inner.fork(name, other)

    def end(self, name: Name) -> None:
        _tell({"end": [name]})
        self.inner.end(name)

    def save(self, page: int) -> Tensor:
        raise TreadleError(
            "the pages of a model over several processes are not kept on disk: leave "
            "EngineConfig.prefix_folder empty"
        )

    def load(self, page: int, content: Tensor) -> None:
        raise AssertionError("nothing is saved, so nothing is loaded")

    def close(self) -> None:
        """The other processes return from `follow`."""
        _tell({})


@torch.inference_mode()
def follow(model: DecoderModel, cache: Cache = Paged()) -> None:
    """Compute what process 0 says until it closes its runner; `cache` as there."""
    model = shard(model, dist.get_rank(), dist.get_world_size())
    inner = TorchRunner(model, cache=cache, **_hear())
    while said := _hear():
        ((what, given),) = said.items()
        match what:
            case "run":
                given["names"] = [tuple(name) for name in given["names"]]
                inner.run(Batch(**given))
            case "copy":
                inner.copy(*given)
            case "fork":
                inner.fork(*map(tuple, given))
            case "end":
                inner.end(*map(tuple, given))


def _tell(what: dict[str, Any]) -> None:
    text = bytearray(json.dumps(what).encode())
    dist.broadcast(torch.tensor([len(text)]), src=0)
    dist.broadcast(torch.frombuffer(text, dtype=torch.uint8), src=0)


def _hear() -> dict[str, Any]:
    size = torch.empty(1, dtype=torch.long)
    dist.broadcast(size, src=0)
    text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, src=0)
    said: dict[str, Any] = json.loads(bytes(text.tolist()))
    return said
