"""An engine in one process, or over those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.models import open_model
from treadle.cli.voice import engine_of

if TYPE_CHECKING:
    from treadle.inference.engine import Engine

TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, help="Processes to cut the model over.")
]


@contextmanager
def engine_over(target: str, device: str, processes: int) -> Iterator[Engine]:
    """An engine with the model that `target` names; in processes but the first, an exit.

    Raises:
        TreadleError: there is no such model or device, it cannot be cut, or torchrun did not start
            as many processes.
    """
    if processes == 1:
        yield engine_of(target, device)
        return
    import torch.distributed as dist

    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.tensor_parallel import TensorParallelRunner, follow, join
    from treadle.inference.torch_runner import pages_for
    from treadle.tokenizers.load import tokenizer_of

    rank, chosen = join(processes, device)
    try:
        opened = open_model(target)
        model = opened.model.requires_grad_(False).eval().to(chosen)
        if rank:
            follow(model)
            raise typer.Exit
        config = EngineConfig()
        runner = TensorParallelRunner(
            model, pages=pages_for(model, config.slots, config.cache_tokens)
        )
        try:
            yield Engine.of_runner(runner, tokenizer_of(opened), config)
        finally:
            runner.close()
    finally:
        dist.destroy_process_group()
