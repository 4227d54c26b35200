"""Which of several adapters a prompt is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.inference.engine import Engine


def chosen_adapter(
    engine: Engine, folders: Sequence[str], examples: Path, tokens: Sequence[int]
) -> str:
    """The adapter whose example prompts these tokens are most like.

    Args:
        examples: JSON lines of `adapter`, one of `folders`, and `prompt`.

    Raises:
        TreadleError: there is no such file, the engine runs in native kernels, fewer than two
            adapters are given, or a row names none of them.
        ConfigError: an adapter has no example.
    """
    from treadle.core.errors import TreadleError, did_you_mean
    from treadle.data.read import read_rows
    from treadle.inference.torch_runner import TorchRunner
    from treadle.peft.request_router import fit_router

    if len(folders) < 2:
        raise TreadleError("--route chooses among adapters: give --adapter at least twice")
    prompts: dict[str, list[list[int]]] = {folder: [] for folder in folders}
    for number, row in enumerate(read_rows(examples), 1):
        adapter, prompt = row.get("adapter"), row.get("prompt")
        if not isinstance(adapter, str) or not isinstance(prompt, str):
            raise TreadleError(
                f"{examples}, row {number}: write `adapter` and `prompt`, both texts"
            )
        if adapter not in prompts:
            hint = did_you_mean(adapter, prompts)
            raise TreadleError(f"{examples}, row {number}: no --adapter `{adapter}`{hint}")
        prompts[adapter].append(engine.tokenizer.encode(prompt, add_special=True))
    if not isinstance(engine.runner, TorchRunner):
        raise TreadleError(f"--route needs a model in plain torch: {type(engine.runner).__name__}")
    router = fit_router(engine.runner.model, [prompts[folder] for folder in folders])
    return folders[int(router(engine.runner.model, [tokens])[0])]
