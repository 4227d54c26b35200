"""`treadle plan`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command

if TYPE_CHECKING:
    from treadle.models.decoder import Decoder
    from treadle.planning.estimate import Machine, Row


def plan(
    model: Model,
    records: Annotated[int, typer.Option("--records", "-r", min=1, help="Examples.")] = 1000,
    tokens: Annotated[
        int, typer.Option("--tokens", "-t", min=2, help="Tokens in an example, on average.")
    ] = 256,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    goal: Annotated[
        str, typer.Option("--goal", "-g", help="task, knowledge, many or smaller.")
    ] = "task",
    per_step: Annotated[
        int, typer.Option("--per-step", min=1, help="Examples in an optimiser step.")
    ] = 16,
    at_once: Annotated[
        int, typer.Option("--at-once", min=8, help="Most tokens in a micro-batch.")
    ] = 2048,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of the machine, such as 16GB [this one's].")
    ] = None,
    disk: Annotated[str | None, typer.Option("--disk", help="Free, such as 50GB.")] = None,
    gflops: Annotated[
        float | None, typer.Option("--gflops", help="GFLOP/s in bf16 [measured here].")
    ] = None,
) -> None:
    """Foretell memory, time, disk and trained parameters of each method, and recommend one.

    The step of each method is rehearsed on tensors without memory, so a model that this machine
    could never hold can be planned for another one.
    """
    from treadle.core.errors import TreadleError, did_you_mean
    from treadle.core.progress import standard
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.planning.choose import GOALS, recommend
    from treadle.planning.estimate import Data, estimate
    from treadle.planning.methods import methods

    known = {name: name for name in GOALS}
    if goal not in known:
        raise TreadleError(f"--goal {goal}: no such goal{did_you_mean(goal, known)}")
    decoder = decoder_of(model)
    data = Data(records=records, tokens=tokens, epochs=epochs, per_step=per_step, at_once=at_once)
    machine = machine_of(memory, disk, gflops)
    progress = standard()
    try:
        rows = estimate(decoder, data, machine, methods(), progress)
    finally:
        progress.close()
    for line in table(rows):
        typer.echo(line)
    typer.echo(
        f"\n{data.steps} steps of {per_step} examples in {type(machine.precision).__name__}; "
        f"{machine.name}: {machine.flops / 1e9:.0f} GFLOP/s"
    )
    chosen = recommend(rows, known[goal], data, machine)
    typer.echo(f"for {GOALS[known[goal]]}: {chosen.row.method.name}")
    for reason in chosen.reasons:
        typer.echo(f"  - {reason}")
    if shared := keep_tensors_apart():
        typer.echo(f"{shared}; a run takes more than this, by the holes that stay between")


def decoder_of(target: str) -> Decoder:
    """The shape of the model that `target` names: a family's preset, or what has weights."""
    import importlib

    from treadle.cli.models import open_model, source_of
    from treadle.cli.targets import presets
    from treadle.models.hub.load import read_decoder
    from treadle.models.hub.pull import pull
    from treadle.models.source import Pretrained

    name, known = target.replace("_", "-"), presets()
    if name in known and not Path(target).exists():
        decoder: Decoder = getattr(importlib.import_module(known[name]), name.replace("-", "_"))()
        return decoder
    source = source_of(target)
    if isinstance(source, Pretrained):
        return read_decoder(
            pull(source.name, progress=lambda line: typer.echo(line, err=True)).path
        )
    return open_model(target).model.config


def machine_of(memory: str | None, disk: str | None, gflops: float | None) -> Machine:
    """This machine, with what was said of another one in its place."""
    import psutil

    from treadle.planning.estimate import Machine
    from treadle.train.precision import race

    found = None if gflops else race("cpu")
    return Machine(
        memory_bytes=_bytes(memory) if memory else psutil.virtual_memory().total,
        disk_bytes=_bytes(disk) if disk else shutil.disk_usage(Path.cwd()).free,
        fp32_gflops=found.fp32 if found else (gflops or 0.0) / 2,
        bf16_gflops=found.bf16 if found else (gflops or 0.0),
        name="the machine you named" if memory or disk or gflops else "this machine",
    )


def _bytes(text: str) -> int:
    from treadle.core.errors import TreadleError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if number.endswith(u)), "")
    try:
        return round(float(number.removesuffix(unit)) * units[unit])
    except (KeyError, ValueError):
        raise TreadleError(f"`{text}` is no size: write it as 16GB or 24GiB") from None


def table(rows: list[Row]) -> list[str]:
    """A line a method."""
    from treadle.planning.choose import gib

    head = f"{'method':13} {'trained':>12} {'memory':>10} {'time':>9} {'result':>10} {'disk':>10}"
    lines = [head]
    for row in rows:
        lines.append(
            f"{row.method.name:13} {row.needs.trained:12,} {gib(row.needs.resident):>10} "
            f"{_duration(row.seconds):>9} {gib(row.result_bytes):>10} {gib(row.disk_bytes):>10}"
            + ("" if row.fits else "  does not fit")
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


COMMAND = Command(
    name="plan",
    run=plan,
    examples=(
        "treadle plan smollm2-135m-instruct --records 1000 --tokens 160",
        "treadle plan smollm2-135m-instruct --records 1000 --goal smaller",
        "treadle plan llama3-8b --records 50000 --memory 24GB --gflops 80000",
    ),
)
