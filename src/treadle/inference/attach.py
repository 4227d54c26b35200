"""Adapters on an engine that may be at work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.inference.adapters import Adapters, CannotShareError
from treadle.inference.engine import Engine
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.peft.folders import load_tuned, rewrites_layers


def attach(engine: Engine, name: str, folder: StrPath) -> None:
    """Offer the adapter of a PEFT folder; a request takes it by `Request.adapter`.

    Raises:
        CannotShareError: the engine runs in native kernels, compiled or recorded, or the adapter is
            of a kind that cannot share a batch.
        TreadleError: the name is taken, or weights are not finite.
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
    """
    runner = _torch_runner(engine, name)
    if not rewrites_layers(folder):
        raise CannotShareError(
            f"{folder}: a learned prefix cannot share a batch with what begins otherwise; it needs "
            "an engine of its own"
        )
    if runner.advance is not None:
        raise CannotShareError(
            f"adapter `{name}`: decoding that is compiled or recorded runs the model alone; take "
            "--decode Eager, or merge it (`treadle merge`)"
        )
    if runner.adapters is None:
        runner.adapters = Adapters(runner.model, engine.config.adapters)
    runner.adapters.load(name, folder)


def beside(base: Engine, folder: StrPath) -> Engine:
    """An engine of its own for what a PEFT folder holds; the base's weights are shared, not copied.

    To be called between the base's passes: what is copied must not be at work.

    Raises:
        CannotShareError: the base runs in native kernels.
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
    """
    runner = _torch_runner(base, str(folder))
    plain = runner.model if runner.adapters is None else runner.adapters.plain
    shared = {id(tensor): tensor for tensor in chain(plain.parameters(), plain.buffers())}
    model: DecoderModel = load_tuned(copy.deepcopy(plain, shared), folder)
    model.requires_grad_(False).eval()
    return Engine(model, base.tokenizer, base.config, autocast=runner.autocast)


def placed(engine: Engine, folder: str) -> tuple[Engine, str | None]:
    """The engine that continues by a folder's adapter, and what a request to it is to name.

    Raises:
        CannotShareError: the engine runs in native kernels.
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
    """
    try:
        attach(engine, folder, folder)
    except CannotShareError:
        return beside(engine, folder), None
    return engine, folder


def _torch_runner(engine: Engine, adapter: str) -> TorchRunner:
    if isinstance(engine.runner, TorchRunner):
        return engine.runner
    raise CannotShareError(
        f"adapter `{adapter}`: {type(engine.runner).__name__} runs a model without adapters; take "
        "another device, or merge it (`treadle merge`)"
    )


def detach(engine: Engine, name: str) -> None:
    """Withdraw an adapter.

    Raises:
        TreadleError: there is none of this name, or requests that use it are under way.
    """
    shelf = engine.runner.adapters
    if shelf is None:
        raise TreadleError(f"no adapter `{name}`: the engine has none")
    under_way = (s for s in (*engine.running, *engine.waiting) if s.finish is None)
    users = {s.job for s in under_way if s.request.adapter == name}
    if users:
        raise TreadleError(
            f"adapter `{name}` is in use by {len(users)} requests: let them end, or cancel them"
        )
    shelf.unload(name)


@contextmanager
def applied(engine: Engine, name: str | None, tokens: int) -> Iterator[None]:
    """While it lasts, a pass of so many tokens through the engine's model takes this adapter.

    Raises:
        TreadleError: there is none of this name, or every slot is taken by requests under way.
    """
    shelf = engine.runner.adapters
    if shelf is None or name is None:
        yield
        return
    others = {s.request.adapter for s in engine.running if s.request.adapter is not None}
    if not shelf.bring({name, *others}):
        raise TreadleError(f"all {shelf.slots} adapter slots are in use; try again")
    with shelf.routed([(name, tokens)]):
        yield
