"""Which folder a name means, and which task in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import tiny_model

from treadle.core.errors import ConfigError, TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.models.heads import ClassHead, NumberHead
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import Transform, transformed
from treadle.objectives.hidden_states import StudentProjection
from treadle.peft.folders import WithAdapter, load_tuned, rewrites_layers, save_tuned
from treadle.peft.lora import LoRA
from treadle.peft.multitask_prompt import PerTask, task_table
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prompt import PromptTuning


def test_a_hash_is_a_task_only_behind_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "c#1" / "prompts#0"
    model = PromptTuning(tokens=2, encoder=PerTask(tasks=3))(tiny_model())
    save_tuned(model, folder)
    assert task_table(load_tuned(tiny_model(), f"{folder}#2")).task == 2
    assert not rewrites_layers(folder)
    assert not rewrites_layers(f"{folder}#2")
    with pytest.raises(ConfigError, match=r"prompts of 3 tasks; name one, .*prompts#0#0 to "):
        load_tuned(tiny_model(), folder)
    with pytest.raises(ConfigError, match="prompts of 3 tasks; name one"):
        load_tuned(tiny_model(), f"{folder}#first")
    with pytest.raises(TreadleError, match=r"none: no adapter_config.json"):
        load_tuned(tiny_model(), tmp_path / "none")


@pytest.mark.parametrize(
    ("transforms", "lost"),
    [
        ((LoRA(rank=2, targets=("q",)), PrefixTuning(tokens=2)), r"blocks\.0\.mixer\.q\.A"),
        ((LoRA(rank=2, targets=("q",)), ClassHead(labels=("a", "b"))), r"head\.linear\.weight"),
        ((PrefixTuning(tokens=2), NumberHead()), r"head\.linear\.weight"),
    ],
)
def test_what_a_folder_does_not_hold_is_not_lost_in_silence(
    transforms: tuple[Transform, ...], lost: str, tmp_path: Path
) -> None:
    model = transformed(tiny_model(), transforms)
    with pytest.raises(ConfigError, match=rf"`{lost}` was trained too, .* whole model"):
        save_tuned(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_helps_to_train_is_left_behind(tmp_path: Path) -> None:
    model = transformed(tiny_model(), (LoRA(rank=2, targets=("q",)), StudentProjection(width=8)))
    assert any(n.startswith("projection") for n, p in model.named_parameters() if p.requires_grad)
    save_tuned(model, tmp_path / "a")
    load_tuned(tiny_model(), tmp_path / "a")


class Sized(ModelSource):
    """A model that takes so many bytes on the disk, or nobody knows how many."""

    size: int | None

    def open(self, workspace: Workspace) -> Opened:
        return Opened(tiny_model(), workspace.root, bytes_on_disk=self.size)


def test_an_adapter_counts_in_the_size(tmp_path: Path) -> None:
    save_tuned(LoRA(rank=2, targets=("q",))(tiny_model()), tmp_path / "a")
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    work = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()))
    for base in (5_000, None):
        source = WithAdapter(model=Sized(size=base), folder=str(tmp_path / "a"))
        assert source.open(work).bytes_on_disk == (base or 0) + size


def test_adapters_in_such_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "c#" / "lora"
    torch.manual_seed(0)
    save_tuned(LoRA(rank=2, targets=("q",))(tiny_model()), folder)
    assert rewrites_layers(folder)
    load_tuned(tiny_model(), folder)
    with pytest.raises(ConfigError, match="LORA has no tasks; leave out #0"):
        load_tuned(tiny_model(), f"{folder}#0")
