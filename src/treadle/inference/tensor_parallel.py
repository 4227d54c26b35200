"""Tensor-parallel inference: one process schedules, all compute each pass on their part.

Process 0 has the engine. It tells the others what the pass is (tokens, pages: some hundred bytes)
and all run it together; no other process schedules, samples or sees a request, so none can differ.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.inference.cache import Cache
from treadle.inference.engine import Engine
from treadle.inference.limits import EngineConfig
from treadle.inference.paged_memory import Paged, pages_for
from treadle.inference.runner import Batch, Name, Runner
from treadle.inference.shards import shard
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.parallel",
    paper="Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053",
    summary="A model cut over processes by heads, hidden units and vocabulary.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --tensor-parallel 2",
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


@dataclass
class Link:
    """How things stand between process 0 and the others."""

    closed: threading.Event = field(default_factory=threading.Event)
    broken: bool = False
    """A pass failed, so the processes are no longer at the same place."""


class TensorParallelRunner(Runner):
    """The runner of process 0; the others are in `follow`. Close it to let them go.

    Args:
        model: this process's part, or the whole, the same in every process, of which this one's
            part is kept.
    """

    def __init__(
        self, model: DecoderModel, *, pages: int, page: int = 16, cache: Cache = Paged()
    ) -> None:
        model = shard(model, dist.get_rank(), dist.get_world_size())
        self.inner = TorchRunner(model, pages=pages, page=page, cache=cache)
        self.page, self.pages, self.lasting = page, pages, self.inner.lasting
        self.vocab, self.context = self.inner.vocab, self.inner.context
        self.link = Link()
        _tell({"pages": pages, "page": page})

    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        try:
            _tell({"run": asdict(batch)})
            return self.inner.run(batch)
        except Exception:
            self.link.broken = True
            raise

    def weights(self) -> dict[int, int]:
        return self.inner.weights()

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
        if not (self.link.closed.is_set() or self.link.broken):
            self.link.broken = not _told({})
        self.link.closed.set()


class Crew:
    """Process 0's side of a model that is opened over all processes, and may be opened again.

    The others are in `attend_to`; `dismiss` lets them go.

    Args:
        load: this process's part and the tokenizer.
    """

    def __init__(
        self, load: Callable[[], tuple[DecoderModel, Tokenizer]], config: EngineConfig
    ) -> None:
        self.load, self.config = load, config
        self._link: Link | None = None

    def open(self) -> Engine:
        """An engine over all processes; that of before must be closed, or about to be.

        Raises:
            TreadleError: the model cannot be loaded or cut, or a process has failed.
        """
        if self._link is not None:
            self._link.closed.wait()
            if self._link.broken:
                raise TreadleError(
                    "a process of this model has failed, so the others cannot go on: start again"
                )
        _tell({"open": []})
        model, tokenizer = self.load()
        pages = pages_for(model, self.config.slots, self.config.cache_tokens)
        cache = self.config.cache or Paged()
        runner = TensorParallelRunner(model, pages=pages, cache=cache)
        self._link = runner.link
        return Engine.of_runner(runner, tokenizer, self.config)

    def dismiss(self) -> None:
        """The others return from `attend_to`."""
        if self._link is None or not self._link.broken:
            _told({})


def attend_to(load: Callable[[], DecoderModel], cache: Cache = Paged()) -> None:
    """In every process but the first: hold a part whenever process 0 opens the model.

    Raises:
        TreadleError: the model cannot be loaded or cut, or process 0 is gone.
    """
    while _hear():
        follow(load(), cache)


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


def _told(what: dict[str, Any]) -> bool:
    """Whether the others are still there to be told."""
    try:
        _tell(what)
    except RuntimeError:
        return False
    return True


def _hear() -> dict[str, Any]:
    size = torch.empty(1, dtype=torch.long)
    try:
        dist.broadcast(size, src=0)
        text = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, src=0)
    except RuntimeError as error:
        raise TreadleError(f"process 0 of this model is gone: {error}") from None
    said: dict[str, Any] = json.loads(bytes(text.tolist()))
    return said
