"""Which of several adapters a prompt is for, by examples of what each is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from treadle.core.errors import ConfigError, FileFormatError, TreadleError, did_you_mean
from treadle.data.read import read_rows
from treadle.inference.engine import Engine
from treadle.inference.torch_runner import TorchRunner
from treadle.peft.request_router import RequestRouter, fit_router


class Chooser:
    """The adapter whose examples a prompt is most like.

    Args:
        examples: prompts of each adapter.

    Raises:
        ConfigError: fewer than two adapters, or one without a prompt.
    """

    def __init__(self, examples: Mapping[str, Sequence[str]]) -> None:
        if len(examples) < 2:
            raise ConfigError("a choice is among adapters: name at least two")
        if empty := [name for name, prompts in examples.items() if not prompts]:
            raise ConfigError(f"adapter `{empty[0]}` has no examples to be known by")
        self.examples = examples
        self._router: RequestRouter | None = None

    def __call__(self, engine: Engine, prompt: Sequence[int]) -> str:
        """
        Args:
            engine: of the adapters' base, which reads the examples at the first call; to be called
                between its passes.

        Raises:
            TreadleError: it runs in native kernels.
        """
        if not isinstance(engine.runner, TorchRunner):
            raise TreadleError(
                f"a choice among adapters needs a model in plain torch, not "
                f"{type(engine.runner).__name__}: take another device"
            )
        model = engine.runner.model
        if self._router is None:
            encode = engine.tokenizer.encode
            self._router = fit_router(
                model,
                [[encode(p, add_special=True) for p in own] for own in self.examples.values()],
            )
        return list(self.examples)[int(self._router(model, [prompt])[0])]


def read_examples(path: Path, adapters: Sequence[str]) -> dict[str, list[str]]:
    """Prompts by adapter, from a file with rows of `adapter` and `prompt`.

    Raises:
        FileFormatError: no such file, or a row that is written otherwise or names another adapter.
    """
    found: dict[str, list[str]] = {name: [] for name in adapters}
    for number, row in enumerate(read_rows(path), 1):
        adapter, prompt = row.get("adapter"), row.get("prompt")
        if not isinstance(adapter, str) or not isinstance(prompt, str):
            raise FileFormatError(f"{path}, row {number}: write `adapter` and `prompt`, both texts")
        if adapter not in found:
            hint = did_you_mean(adapter, found)
            raise FileFormatError(f"{path}, row {number}: no adapter `{adapter}`{hint}")
        found[adapter].append(prompt)
    return found
