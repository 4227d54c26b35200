"""Which folder a name means, and which task in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import tiny_model

from treadle.core.errors import ConfigError, TreadleError
from treadle.peft.folders import load_tuned, rewrites_layers, save_tuned
from treadle.peft.lora import LoRA
from treadle.peft.multitask_prompt import PerTask, task_table
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


def test_adapters_in_such_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "c#" / "lora"
    torch.manual_seed(0)
    save_tuned(LoRA(rank=2, targets=("q",))(tiny_model()), folder)
    assert rewrites_layers(folder)
    load_tuned(tiny_model(), folder)
    with pytest.raises(ConfigError, match="LORA has no tasks; leave out #0"):
        load_tuned(tiny_model(), f"{folder}#0")
