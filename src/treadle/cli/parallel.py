"""An engine in one process, or over several that hold a part of the model each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.models import open_model, source_of
from treadle.cli.numbers import Numbers
from treadle.cli.voice import NATIVE, engine_of, on_torch

if TYPE_CHECKING:
    import torch

    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.tensor_parallel import Crew
    from treadle.models.decoder import DecoderModel
    from treadle.tokenizers.tokenizer import Tokenizer

Experts = Annotated[
    int | None,
    typer.Option("--experts", min=1, help="Experts of a layer in memory; the file has the others."),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel",
        min=1,
        help="Processes to cut the model over; started here, unless torchrun did.",
    ),
]
COMMANDS = ("treadle", "__main__")
"""How this program is called."""
PATIENCE = 20.0
"""Seconds that a process has to end by itself."""


@contextmanager
def engine_over(
    target: str,
    device: str,
    limits: EngineConfig,
    *,
    processes: int = 1,
    experts: int | None = None,
    numbers: Numbers = Numbers(),
) -> Iterator[Engine]:
    """An engine with the model that `target` names; in processes but the first, an exit.

    Args:
        processes: that hold a part of the model each.
        experts: of each layer that are kept in memory; None: all.
        numbers: of the weights, in one process that holds them all.

    Raises:
        TreadleError: there is no such model or device, it cannot be cut, torchrun did not start as
            many processes, or the model has no experts that could stay in its file.
    """
    check_whole(limits, numbers, whole=processes == 1 and experts is None)
    if experts is not None:
        yield _offloaded(target, device, limits, processes, experts)
        return
    if processes == 1:
        yield engine_of(target, device, limits, numbers)
        return
    with crew_over(target, device, limits, processes) as crew:
        engine = crew.open()
        try:
            yield engine
        finally:
            engine.runner.close()


@contextmanager
def crew_over(target: str, device: str, limits: EngineConfig, processes: int) -> Iterator[Crew]:
    """What opens a model over several processes; in those but the first, an exit.

    Raises:
        TreadleError: as `engine_over`.
        Exit: a process ended before its time, which was said.
    """
    from treadle.core.errors import TreadleError
    from treadle.inference.paged_memory import Paged
    from treadle.inference.tensor_parallel import Crew, attend_to

    if device == NATIVE:
        raise TreadleError(
            "native kernels run in one process: leave out --device native or --tensor-parallel"
        )
    with _together(processes, on_torch(device)) as (rank, chosen):
        load = partial(_part, target, rank, processes, chosen)
        if rank:
            with suppress(TreadleError):  # process 0 says the same, or is gone
                attend_to(lambda: load()[0], limits.cache or Paged())
            raise typer.Exit
        crew = Crew(load, limits)
        try:
            yield crew
        finally:
            crew.dismiss()


def _part(
    target: str, rank: int, size: int, device: torch.device
) -> tuple[DecoderModel, Tokenizer]:
    """One process's part of a model; of a file or folder nothing else is read."""
    import torch

    from treadle.inference.shards import outline_part, shard
    from treadle.models.hub.load import load_model
    from treadle.models.hub.pull import pull
    from treadle.models.source import Opened, Pretrained
    from treadle.tokenizers.load import tokenizer_of

    source = source_of(target)
    if isinstance(source, Pretrained):
        path = pull(source.name).path
        cut = partial(outline_part, rank=rank, size=size)
        loaded = load_model(path, dtype=torch.float32, device=device, cut=cut)
        opened = Opened(loaded.model, path, loaded.metadata)
    else:  # what a run has trained may be an adapter, which is merged into the whole
        opened = open_model(target)
        shard(opened.model, rank, size)
    model = opened.model.requires_grad_(False).eval().to(device)
    return model, tokenizer_of(opened)


@contextmanager
def _together(processes: int, device: str) -> Iterator[tuple[int, torch.device]]:
    """Among the processes of this command: this one's rank and device."""
    import torch
    import torch.distributed as dist

    from treadle.core.machine import machine
    from treadle.inference.tensor_parallel import join

    with _others(processes):
        rank, chosen = join(processes, device)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, machine()["cores"] // processes))
        try:
            yield rank, chosen
        finally:
            dist.destroy_process_group()


@dataclass
class _Others:
    """Processes of the same command. One that ends before its time ends this one as well."""

    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lost: str = ""
    ending: bool = False

    def watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if not (self.ending or self.lost) and code:
            self.lost = f"process {rank} of {len(self.children) + 1} ended ({code}): start again"
            typer.secho(self.lost, err=True)
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _others(processes: int) -> Iterator[None]:
    """The other processes of this command, unless torchrun started them.

    Within another program there is no command line that they could run; `join` says what to do.
    """
    if "WORLD_SIZE" in os.environ or Path(sys.argv[0]).stem not in COMMANDS:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    others = _Others()
    for rank in range(1, processes):
        child = subprocess.Popen(
            [sys.executable, "-m", "treadle", *sys.argv[1:]],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for process 0, which tells the others
        )
        others.children.append(child)
    for rank, child in enumerate(others.children, 1):
        threading.Thread(target=others.watch, args=(rank, child), daemon=True).start()
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    try:
        yield
    finally:
        others.ending = True
        for name in (*shared, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
        for child in others.children:
            _end(child)
    if others.lost:
        raise typer.Exit(1)


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()


def check_whole(limits: EngineConfig, numbers: Numbers, *, whole: bool) -> None:
    """Raises TreadleError where number formats or a way to decode are asked of a part."""
    from treadle.core.errors import TreadleError
    from treadle.inference.decode import Eager

    if whole or (not numbers.given and isinstance(limits.decode, Eager)):
        return
    raise TreadleError(
        "--dtype, --quantize and --decode are for a model that one process holds whole: leave them "
        "out, or --tensor-parallel and --experts"
    )


def told_of_experts(engine: Engine) -> None:
    """Say on standard error how often an expert was found in memory."""
    from treadle.inference.experts import hit_rate
    from treadle.inference.torch_runner import TorchRunner

    assert isinstance(engine.runner, TorchRunner)
    found, asked = hit_rate(engine.runner.model)
    typer.secho(f"({found} of {asked} experts were in memory)", dim=True, err=True)


def told_of_guesses(engine: Engine) -> None:
    """Say on standard error how many guesses were right, and what a pass gave for them."""
    right, passes = engine.accepted, engine.verified
    typer.secho(
        f"({right} of {engine.guessed} guesses were right: {1 + right / passes:.2f} tokens a pass)",
        dim=True,
        err=True,
    )


def _offloaded(
    target: str, device: str, limits: EngineConfig, processes: int, experts: int
) -> Engine:
    import torch

    from treadle.core.errors import TreadleError
    from treadle.inference.engine import Engine
    from treadle.inference.experts import load_offloaded
    from treadle.models.hub.pull import pull
    from treadle.models.source import Opened
    from treadle.tokenizers.load import tokenizer_of

    if processes > 1:
        raise TreadleError("--experts keeps them in one process: leave out --tensor-parallel")
    folder = pull(target).path
    loaded = load_offloaded(folder, experts=experts, dtype=torch.float32, device=device)
    opened = Opened(loaded.model.requires_grad_(False), folder, loaded.metadata)
    return Engine(opened.model, tokenizer_of(opened), limits)
