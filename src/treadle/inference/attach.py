"""Adapters on an engine that may be at work."""

from __future__ import annotations

from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.inference.adapters import Adapters
from treadle.inference.engine import Engine
from treadle.inference.torch_runner import TorchRunner


def attach(engine: Engine, name: str, folder: StrPath) -> None:
    """Offer the adapter of a PEFT folder; a request takes it by `Request.adapter`.

    Raises:
        TreadleError: the engine runs in native kernels, the name is taken, or the adapter is of a
            kind that cannot share a batch.
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
    """
    runner = engine.runner
    if not isinstance(runner, TorchRunner):
        raise TreadleError(
            f"adapter `{name}`: {type(runner).__name__} runs a model without adapters; take "
            "another device, or merge it (`treadle merge`)"
        )
    if runner.adapters is None:
        runner.adapters = Adapters(runner.model, engine.config.adapters)
    runner.adapters.load(name, folder)


def detach(engine: Engine, name: str) -> None:
    """Withdraw an adapter.

    Raises:
        TreadleError: there is none of this name, or requests that use it are under way.
    """
    shelf = engine.runner.adapters
    if shelf is None:
        raise TreadleError(f"no adapter `{name}`: the engine has none")
    users = {s.job for s in (*engine.running, *engine.waiting) if s.request.adapter == name}
    if users:
        raise TreadleError(
            f"adapter `{name}` is in use by {len(users)} requests: let them end, or cancel them"
        )
    shelf.unload(name)
