"""`treadle serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.chat import Device
from treadle.cli.command import Command
from treadle.cli.kinds import CacheKind, DecodeKind, DraftKind, limits_of
from treadle.cli.numbers import Dtype, Numbers, Quantize
from treadle.cli.parallel import TensorParallel, check_whole, crew_over

if TYPE_CHECKING:
    from treadle.inference.engine import EngineConfig
    from treadle.serving.app import App
    from treadle.serving.config import Serve
    from treadle.serving.pool import Offer


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL...", help="Runs, models, hub ids or files; the first is loaded."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An adapter on the first model, whose engine and weights it shares; repeatable.",
        ),
    ] = None,
    adapter_slots: Annotated[int, typer.Option(min=1, help="Adapters in memory at once.")] = 8,
    trial: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A:B", help="An A/B test of two models; see `treadle trial`."),
    ] = None,
    trial_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Votes and figures of trials go here.")
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="A model name that means the adapter which a prompt is for, by examples: JSON "
            "lines of `adapter` and `prompt`.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    key: Annotated[
        list[str] | None,
        typer.Option(envvar="TREADLE_API_KEYS", help="An API key that clients must send."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Completions computed together.")] = 64,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests a model has in hand; more get a 429.")
    ] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for an answer.")] = 600.0,
    idle: Annotated[
        float, typer.Option(min=0.1, help="Seconds until an unused model is unloaded.")
    ] = 900.0,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="GB of weights that may be loaded at once.")
    ] = None,
    prefixes: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What was computed of prompts is kept here."),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish answers after SIGTERM.")
    ] = 30.0,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of the server, by Ray Serve where more than one.")
    ] = 1,
    cache: CacheKind = None,
    draft: DraftKind = None,
    decode: DecodeKind = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    tensor_parallel: TensorParallel = 1,
    device: Device = "auto",
) -> None:
    """Answer the OpenAI protocol, and show a chat page."""
    _need_extra()
    from treadle.core.errors import TreadleError
    from treadle.serving.app import build
    from treadle.serving.config import Limits, Serve
    from treadle.serving.pool import Base
    from treadle.serving.route import parse_route
    from treadle.serving.trial import parse_trial

    config = Serve(
        host=host,
        port=port,
        keys=tuple(key or ()),
        limits=Limits(requests=requests, seconds=seconds),
        idle_seconds=idle,
        memory_bytes=None if memory is None else int(memory * 1e9),
        drain_seconds=drain,
    )
    limits = limits_of(cache, draft, decode, slots=slots, adapters=adapter_slots)
    limits = limits.model_copy(update={"prefix_folder": str(prefixes) if prefixes else None})
    numbers = Numbers(dtype, quantize)
    shown = host if ":" not in host else f"[{host}]"
    if tensor_parallel > 1:
        _only(models, replicas=replicas > 1, adapter=adapter, trial=trial, route=route)
        check_whole(limits, numbers, whole=False)
        if prefixes is not None:
            raise TreadleError("--tensor-parallel keeps no prefixes on disk: leave out --prefixes")
        name, target = _named(models[0])
        with crew_over(target, device, limits, tensor_parallel) as crew:
            _serve(build([Base(name, crew.open)], config), name, config, shown)
        return
    offers = offers_of(models, adapter or [], device, limits, numbers)
    if replicas > 1:
        if route:
            raise TreadleError("replicas know no routes: leave out --replicas or --route")
        _replicated(offers, config, replicas, trial, f"http://{shown}:{port}")
        return
    trials = [parse_trial(text) for text in trial or ()]
    routes = [parse_route(text) for text in route or ()]
    app = build(offers, config, trials=trials, trial_log=trial_log, routes=routes)
    _serve(app, offers[0].name, config, shown)


def _only(models: list[str], **others: bool | list[str] | None) -> None:
    """
    Raises:
        TreadleError: besides one model there are things that a model in parts does not serve.
    """
    from treadle.core.errors import TreadleError

    given = [f"--{name}" for name, value in others.items() if value]
    given += ["all but one model"] if len(models) > 1 else []
    if given:
        raise TreadleError(f"--tensor-parallel serves one model by itself: leave out {given[0]}")


def _serve(app: App, first: str, config: Serve, shown: str) -> None:
    """Load the model `first`, so that a mistake in its name is told here and now; then answer."""
    import asyncio

    from treadle.core.errors import TreadleError
    from treadle.serving.errors import ApiError
    from treadle.serving.run import listen, serve

    listener = listen(config)
    url = f"http://{shown}:{listener.getsockname()[1]}"

    async def run() -> None:
        try:
            async with app.service.pool.use(first):
                pass
        except ApiError as error:
            raise TreadleError(error.message) from None
        await serve(app, listener, lambda: _say(url, app.service.names))

    asyncio.run(run())


def _replicated(
    offers: list[Offer], config: Serve, replicas: int, trial: list[str] | None, url: str
) -> None:
    from treadle.core.errors import TreadleError
    from treadle.serving import ray_app

    if trial:
        raise TreadleError("a trial's votes are counted by one server: leave out --replicas")
    names = [offer.name for offer in offers]
    ray_app.serve(offers, config, replicas=replicas, ready=lambda: _say(url, names))


def offers_of(
    models: list[str],
    adapters: list[str],
    device: str,
    limits: EngineConfig,
    numbers: Numbers = Numbers(),
) -> list[Offer]:
    """What the arguments name.

    Raises:
        TreadleError: an adapter is not written NAME=FOLDER.
    """
    from functools import partial

    from treadle.cli.voice import engine_of, on_torch
    from treadle.core.errors import TreadleError
    from treadle.serving.pool import Adapted, Base

    offers: list[Offer] = []
    for text in models:
        name, target = _named(text)
        adapted = adapters and not offers
        chosen = on_torch(device) if adapted else device  # native kernels run no adapters
        offers.append(Base(name, partial(engine_of, target, chosen, limits, numbers)))
    for text in adapters:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise TreadleError(f"--adapter {text}: write it NAME=FOLDER")
        offers.append(Adapted(name, offers[0].name, folder))
    return offers


def _named(text: str) -> tuple[str, str]:
    """What [NAME=]MODEL says: by which name clients ask, and what it is."""
    name, equals, target = text.partition("=")
    if equals:
        return name, target
    return (Path(text).name if Path(text).exists() else text), text


def _say(url: str, names: list[str]) -> None:
    typer.echo(f"{url} answers for {', '.join(names)}; the chat page is there too")


def _need_extra() -> None:
    from importlib.util import find_spec

    from treadle.core.errors import TreadleError

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(module) is None:
            raise TreadleError(
                f"the server needs `{module}`, which is not installed: pip install 'treadle[serve]'"
            )


COMMAND = Command(
    name="serve",
    run=serve,
    examples=(
        "treadle serve smollm2-135m-instruct",
        "treadle serve runs/quickstart small=smollm2-135m-instruct --port 9000",
        "treadle serve smollm2-135m-instruct --adapter polite=adapters/a --adapter sql=adapters/b",
        "treadle serve smollm2-135m-instruct --adapter a=adapters/a --adapter b=adapters/b "
        "--route auto=examples.jsonl",
        "treadle serve smollm2-135m-instruct --replicas 2",
        "treadle serve smollm2-135m-instruct --tensor-parallel 2",
        "treadle serve new=runs/a old=runs/b --trial duel=new:old --trial-log votes.jsonl",
    ),
)
