"""PEFT folders of any kind: adapters of layers, a learned prefix, the prompts of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from treadle.core.errors import ConfigError
from treadle.core.files import StrPath
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened, weight_bytes
from treadle.peft import multitask_prompt
from treadle.peft.adapter import adapted
from treadle.peft.files import load_adapter, read_config, save_adapter
from treadle.peft.multitask_prompt import (
    TaskTable,
    load_task_prompts,
    save_task_prompts,
    set_task,
    task_table,
)
from treadle.peft.prefix import prefix_of
from treadle.peft.prefix_files import KINDS, load_prefix, save_prefix
from treadle.peft.prompt import SoftPrompt

BASE = ("embedding", "position", "token_type", "embedding_norm", "blocks", "norm", "head")
"""Parts of a decoder. What else it has helps to train it, such as a value head."""


class WithAdapter(ModelSource):
    """A model with what a PEFT folder holds, to be used, measured or trained further."""

    model: ModelSource
    folder: str
    """`FOLDER`, or `FOLDER#1` for the prompt of task 1 where it holds several."""

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        load_tuned(opened.model, self.folder)
        size = weight_bytes(_path_and_task(self.folder)[0])
        return replace(opened, bytes_on_disk=(opened.bytes_on_disk or 0) + size)

    def origins(self, workspace: Workspace) -> Iterator[Path]:
        yield _path_and_task(self.folder)[0]


def save_tuned(model: DecoderModel, folder: StrPath, *, base: str = "") -> None:
    """Write what was added to the model, and nothing of its base, as a PEFT folder.

    Raises:
        ConfigError: nothing was added, or something that no one folder holds.
        TreadleError: the disk is full.
    """
    prefix = prefix_of(model)
    _require_held(model, list(adapted(model).values()) if prefix is None else [prefix])
    if prefix is None:
        save_adapter(model, folder, base=base)
    elif isinstance(prefix, SoftPrompt) and isinstance(prefix.virtual, TaskTable):
        save_task_prompts(model, folder, base=base)
    else:
        save_prefix(model, folder, base=base)


def _require_held(model: DecoderModel, written: Sequence[nn.Module]) -> None:
    held = {id(p) for module in written for p in module.parameters()}
    trained = (n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held)
    lost = next((name for name in trained if name.partition(".")[0] in BASE), None)
    if held and lost:
        raise ConfigError(
            f"`{lost}` was trained too, and a PEFT folder holds adapters of layers or a prefix and "
            "nothing else: export the whole model, or use the run's folder"
        )


def load_tuned(model: DecoderModel, folder: StrPath) -> DecoderModel:
    """Put what a PEFT folder holds on a model, in place; only it will train.

    Args:
        folder: with `#1` behind it for the prompt of task 1, where it holds those of several.

    Raises:
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter that treadle does not have, or no such task.
        TreadleError: no such folder, or only a pickle.
    """
    path, task = _path_and_task(folder)
    kind = read_config(path).get("peft_type")
    if kind != multitask_prompt.KIND:
        if task is not None:
            raise ConfigError(f"{folder}: {kind} has no tasks; leave out #{task}")
        return load_prefix(model, path) if kind in KINDS else load_adapter(model, path)
    load_task_prompts(model, path)
    tasks = len(task_table(model).U)
    if task is None or not task.isdecimal():
        raise ConfigError(
            f"{folder}: holds the prompts of {tasks} tasks; name one, "
            f"{path}#0 to {path}#{tasks - 1}"
        )
    set_task(model, int(task))
    return model


def rewrites_layers(folder: StrPath) -> bool:
    """Whether a folder holds adapters of layers, and no learned prefix.

    Raises:
        FileFormatError: its configuration is broken.
        TreadleError: no such folder.
    """
    kind = read_config(_path_and_task(folder)[0]).get("peft_type")
    return kind not in (*KINDS, multitask_prompt.KIND)


def _path_and_task(folder: StrPath) -> tuple[Path, str | None]:
    """A folder may have a # in its own name, as in `c#/adapter`."""
    path, hash_, task = str(folder).rpartition("#")
    return (Path(path), task) if hash_ and not Path(folder).is_dir() else (Path(folder), None)
