"""Run a function in several processes, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.multiprocessing import get_context

TIMEOUT = 240


def _enter(
    function: Callable[..., None], rank: int, world: int, port: int, log: str, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        Path(log).write_text(traceback.format_exc())
        raise


def launch(function: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """`function(*args)` in `world` processes; raises with the traceback of the one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    logs = [folder / f"failed-{rank}.txt" for rank in range(world)]
    processes: list[multiprocessing.Process] = [
        context.Process(target=_enter, args=(function, rank, world, port, str(logs[rank]), args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    failures = [log.read_text() for log in logs if log.exists()]
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(failures)
