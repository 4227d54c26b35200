"""Multi-task prompt tuning: one prompt for all tasks, and a small change of it for each.

    P_k = P * (U_k V_k),     P [n, D],  U_k [n, r],  V_k [r, D];     U_k V_k = 1 at the start

Wang et al. 2023, arXiv:2303.02861. What tasks share is learned from all of them, and a task adds
(n + D) r numbers. A batch says which task it is of; the objective `AsTask` sets it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError, FileFormatError
from treadle.core.files import StrPath
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.peft.files import read_config, read_weights
from treadle.peft.prefix import prefix_of
from treadle.peft.prefix_files import TENSOR, check_prefix_base, write_prefix
from treadle.peft.prompt import PromptTuning, SoftPrompt
from treadle.peft.virtual import VirtualTokens

CARD = Card(
    id="ft.prompt.multitask",
    paper="Wang et al. 2023, Multitask Prompt Tuning, arXiv:2303.02861",
    summary="One learned prompt for all tasks, times a low-rank factor of each task.",
    recipe="treadle run multi-task "
    "steps.sft.objective='{kind: AsTask, objective: {kind: CausalLM}}' "
    "steps.sft.transforms='[{kind: PromptTuning, encoder: {kind: PerTask, tasks: 2}}]'",
    oracle="tests/peft/test_peft_multitask_prompt.py::test_matches_peft_in_every_task",
)
KIND, COLUMNS, ROWS = "MULTITASK_PROMPT_TUNING", "prefix_task_cols", "prefix_task_rows"
STD = 0.02


class PerTask(VirtualTokens):
    """A table for all tasks and factors for each, for `PromptTuning`."""

    tasks: int = Field(ge=1)
    ranks: int = Field(default=1, ge=1)
    """r."""

    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        return TaskTable(start, self)


class TaskTable(nn.Module):
    """The rows of the task that is set."""

    def __init__(self, start: Float[Tensor, "n D"], config: PerTask) -> None:
        super().__init__()
        (n, width), r = start.shape, config.ranks
        self.table = nn.Parameter(start.detach().float().clone())
        # Unequal ranks, else all would learn the same.
        self.U = nn.Parameter(torch.ones(config.tasks, n, r) / r)
        self.V = nn.Parameter(torch.ones(config.tasks, r, width))
        if r > 1:
            noise = STD * torch.randn(config.tasks, r, width)
            self.V.data += noise - noise.mean(1, keepdim=True)
        self.task = 0

    def forward(self) -> Float[Tensor, "n D"]:
        return self.table * (self.U[self.task] @ self.V[self.task])


class AtTask(ModelSource):
    """A model with the prompt of one of its tasks."""

    model: ModelSource
    task: int = Field(ge=0)

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        set_task(opened.model, self.task)
        return opened


def set_task(model: DecoderModel, task: int) -> None:
    """Let the model work on this task from now on.

    Raises:
        ConfigError: it has no prompts of tasks, or not so many.
    """
    table = task_table(model)
    if not 0 <= task < len(table.U):
        raise ConfigError(
            f"task {task} has no prompt: the model was given {len(table.U)}, numbered from 0; "
            "raise `tasks` of PerTask"
        )
    table.task = task


def task_table(model: nn.Module) -> TaskTable:
    """The prompts of tasks that a model has.

    Raises:
        ConfigError: it has none.
    """
    prefix = prefix_of(model)
    if not isinstance(prefix, SoftPrompt) or not isinstance(prefix.virtual, TaskTable):
        raise ConfigError(
            "the model has no prompts of tasks; add the transform PromptTuning with the encoder "
            "PerTask"
        )
    return prefix.virtual


def save_task_prompts(model: DecoderModel, folder: StrPath, *, base: str = "") -> None:
    """Write the prompts of all tasks as a PEFT folder.

    Raises:
        ConfigError: the model has none.
        TreadleError: the disk is full.
    """
    table = task_table(model)
    parts = {TENSOR: table.table, COLUMNS: table.U, ROWS: table.V}
    tasks, n, r = table.U.shape
    settings = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "num_virtual_tokens": n,
        "token_dim": table.table.shape[1],
        "num_layers": len(model.blocks),
        "num_transformer_submodules": 1,
        "num_tasks": tasks,
        "num_ranks": r,
        "inference_mode": True,
    }
    tensors = {name: p.detach().cpu().contiguous() for name, p in parts.items()}
    write_prefix(model, folder, tensors, settings)


def load_task_prompts(model: DecoderModel, folder: StrPath) -> DecoderModel:
    """Put the prompts of a PEFT folder on a model, in place; only they will train.

    Raises:
        FileFormatError: a broken folder, or one for another base.
        ConfigError: another kind of adapter.
        TreadleError: no such folder, or only a pickle.
    """
    folder = Path(folder)
    kind = read_config(folder).get("peft_type")
    if kind != KIND:
        raise ConfigError(f"{folder}: holds {kind}, not {KIND}; load it as what it is")
    tensors, header = read_weights(folder)
    shared, U, V = (tensors.get(name) for name in (TENSOR, COLUMNS, ROWS))
    if len(tensors) != 3 or shared is None or U is None or V is None:
        raise FileFormatError(f"{folder}: holds {sorted(tensors)}, not one prompt and its factors")
    width = model.config.dim
    if shared.shape != (U.shape[1], width) or V.shape != (U.shape[0], U.shape[2], width):
        raise FileFormatError(
            f"{folder}: the prompt is {tuple(shared.shape)} with factors {tuple(U.shape)} and "
            f"{tuple(V.shape)}, but the embeddings here have {width} numbers; it is for "
            "another base"
        )
    check_prefix_base(model, header, folder)
    encoder = PerTask(tasks=U.shape[0], ranks=U.shape[2])
    PromptTuning(tokens=len(shared), encoder=encoder)(model)
    table = task_table(model)
    with torch.no_grad():
        for place, tensor in ((table.table, shared), (table.U, U), (table.V, V)):
            place.copy_(tensor)
    return model
