"""An engine in one process, or over those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.models import open_model
from treadle.cli.voice import engine_of

if TYPE_CHECKING:
    from treadle.inference.engine import Engine, EngineConfig

Experts = Annotated[
    int | None,
    typer.Option("--experts", min=1, help="Experts of a layer in memory; the file has the others."),
]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, help="Processes to cut the model over.")
]


@contextmanager
def engine_over(
    target: str,
    device: str,
    limits: EngineConfig,
    *,
    processes: int = 1,
    experts: int | None = None,
) -> Iterator[Engine]:
    """An engine with the model that `target` names; in processes but the first, an exit.

    Args:
        processes: that hold a part of the model each.
        experts: of each layer that are kept in memory; None: all.

    Raises:
        TreadleError: there is no such model or device, it cannot be cut, torchrun did not start as
            many processes, or the model has no experts that could stay in its file.
    """
    if experts is not None:
        yield _offloaded(target, device, limits, processes, experts)
        return
    if processes == 1:
        yield engine_of(target, device, limits)
        return
    import torch.distributed as dist

    from treadle.inference.engine import Engine
    from treadle.inference.paged_memory import Paged, pages_for
    from treadle.inference.tensor_parallel import TensorParallelRunner, follow, join
    from treadle.tokenizers.load import tokenizer_of

    rank, chosen = join(processes, device)
    try:
        opened = open_model(target)
        model = opened.model.requires_grad_(False).eval().to(chosen)
        if rank:
            follow(model, limits.cache or Paged())
            raise typer.Exit
        pages = pages_for(model, limits.slots, limits.cache_tokens)
        runner = TensorParallelRunner(model, pages=pages, cache=limits.cache or Paged())
        try:
            yield Engine.of_runner(runner, tokenizer_of(opened), limits)
        finally:
            runner.close()
    finally:
        dist.destroy_process_group()


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
