"""`treadle bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.chat import Device
from treadle.cli.command import Command
from treadle.cli.kinds import CacheKind, DecodeKind, limits_of
from treadle.cli.numbers import Dtype, Numbers, Quantize

if TYPE_CHECKING:
    from treadle.core.meter import Source
    from treadle.evals.speed import Workload
    from treadle.inference.engine import EngineConfig


def bench(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="What to measure; with --url its name there.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Requests at once; with --url clients.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that each reads.")] = 128,
    output: Annotated[int, typer.Option(min=1, help="Tokens that each writes.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often; one more warms up.")] = 3,
    url: Annotated[
        str | None, typer.Option(help="Measure the server there, of OpenAI's protocol.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="TREADLE_API_KEY", help="The server's API key.")
    ] = None,
    until_stop: Annotated[
        bool,
        typer.Option("--until-stop", help="With --url: answers may end before --output tokens."),
    ] = False,
    grid: Annotated[
        float, typer.Option(min=0.0, help="Grams of CO2 for a kWh; 475 is the world's mean.")
    ] = 475.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    cache: CacheKind = None,
    decode: DecodeKind = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = "auto",
) -> None:
    """Measure how fast a model or a server answers, and what energy that takes."""
    from treadle.evals.speed import Workload

    load = Workload(batch=batch, prompt=prompt, output=output, rounds=rounds)
    if url is None:
        limits = limits_of(cache, None, decode, slots=batch)
        found = _of_model(model, load, device, grid, limits, Numbers(dtype, quantize))
    else:
        found = _of_server(url, model, load, key, grid, exact=not until_stop)
    typer.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


def _of_model(
    model: str,
    load: Workload,
    device: str,
    grid: float,
    limits: EngineConfig,
    numbers: Numbers,
) -> dict[str, Any]:
    import time

    from treadle.cli.voice import decoder_of, engine_of, place_of
    from treadle.core.meter import Meter
    from treadle.evals.energy import energy, operations
    from treadle.evals.speed import measure, speed

    engine = engine_of(model, device, limits, numbers)
    flops = operations(decoder_of(engine), load.prompt, load.output)
    warm = load.model_copy(update={"rounds": 1})
    measure(engine, warm, time.perf_counter)  # what is compiled or packed is no part of the energy
    with Meter() as meter:
        timelines = measure(engine, load, time.perf_counter)
        cost = meter.cost()
    answers = load.batch * (load.rounds + 1)
    return {
        **_head(model, place_of(engine), load),
        **speed(timelines).plain(),
        "energy": vars(energy(cost, answers * load.output, grid)),
        "operations": flops,
        "peak_bytes": cost.peak_bytes,
    }


def _of_server(
    url: str, model: str, load: Workload, key: str | None, grid: float, *, exact: bool
) -> dict[str, Any]:
    import time

    from treadle.evals.energy import bill
    from treadle.evals.load import Server
    from treadle.evals.speed import speed

    server = Server(url, model, key=key, exact=exact)
    before: list[tuple[float, Source] | None] = []
    timelines = server.measure(load, time.perf_counter, lambda: before.append(server.spent()))
    after, found = server.spent(), speed(timelines).plain()
    told = None
    if before[0] is not None and after is not None:
        told = vars(bill(after[0] - before[0][0], after[1], found["tokens"], grid))
    return {**_head(model, url, load), **found, "energy": told}


def _head(model: str, where: str, load: Workload) -> dict[str, Any]:
    from treadle.core.machine import machine

    return {"model": model, "where": where, **load.model_dump(), "machine": machine()}


def lines(found: dict[str, Any]) -> list[str]:
    """The table."""
    shape = f"{found['batch']} x ({found['prompt']} + {found['output']} tokens)"
    rates = [found["prefill"], found["decode"], found["throughput"]]
    prefill, decode, throughput = ("-" if rate is None else f"{rate:.1f}" for rate in rates)
    return [
        f"{found['model']} at {found['where']}, {shape}, {found['rounds']} rounds",
        f"{'':15}{'p50':>10}{'p95':>10}{'p99':>10}",
        _spread("first token", found["first_token"]),
        _spread("between tokens", found["between_tokens"]),
        f"prefill {prefill} tok/s, decode {decode} tok/s, throughput {throughput} tok/s",
        *_bill(found),
    ]


def _spread(name: str, spread: dict[str, float] | None) -> str:
    if spread is None:
        return f"{name:15}{'-':>10}"
    return f"{name:15}" + "".join(f"{1e3 * seconds:>7.1f} ms" for seconds in spread.values())


def _bill(found: dict[str, Any]) -> list[str]:
    bill = found["energy"]
    if bill is None:
        return ["energy unknown: the server does not tell"]
    how = "measured for the machine" if bill["source"] == "measured" else "estimated"
    told = [
        f"energy {bill['joules_per_token']:.3g} J/token ({how}), "
        f"{bill['grams_per_million']:.3g} g CO2 a million tokens"
    ]
    if "operations" in found:
        told.append(
            f"arithmetic {found['operations'] / 1e9:.3g} GFLOP a request; "
            f"memory {found['peak_bytes'] / 1e9:.2f} GB"
        )
    return told


COMMAND = Command(
    name="bench",
    run=bench,
    examples=(
        "treadle bench smollm2-135m-instruct",
        "treadle bench smollm2-135m-instruct --device native --batch 8 --prompt 512 --json",
        "treadle bench smollm2-135m-instruct --url http://127.0.0.1:8000 --batch 8",
    ),
)
