"""Prompts of several tasks beside PEFT: values and gradients in each task, folders both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_env import Numbered, chat_env
from expert_models import TinyExpert, nowhere
from peft_pair import TOKENS, logits, tiny, trained, transformers_of
from safetensors.torch import load_file, save_file

from treadle.core.errors import ConfigError, FileFormatError
from treadle.data.supervised import Supervised
from treadle.data.tasks import Task, TaskMix
from treadle.models.decoder import DecoderModel
from treadle.objectives.as_task import AsTask
from treadle.objectives.causal import CausalLM
from treadle.peft.multitask_prompt import (
    AtTask,
    PerTask,
    load_task_prompts,
    save_task_prompts,
    set_task,
    task_table,
)
from treadle.peft.prefix_files import save_prefix
from treadle.peft.prompt import PromptTuning

PROMPTS = PromptTuning(tokens=5, encoder=PerTask(tasks=3, ranks=2))


def pair() -> tuple[DecoderModel, Any]:
    """Ours and PEFT's with the same numbers, of a size that shows."""
    from peft import MultitaskPromptTuningConfig, get_peft_model

    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2
    )
    theirs = get_peft_model(transformers_of(tiny()), config)
    model = PROMPTS(tiny())
    table, encoder = task_table(model), theirs.prompt_encoder["default"]
    with torch.no_grad():
        for mine, other in both(table, encoder):
            mine.add_(torch.randn_like(mine), alpha=0.5)
            other.copy_(mine)
    return model, theirs


def both(table: Any, encoder: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (table.table, encoder.embedding.weight),
        (table.U, encoder.prefix_task_cols),
        (table.V, encoder.prefix_task_rows),
    ]


def theirs_at(theirs: Any, task: int) -> torch.Tensor:
    out: torch.Tensor = theirs(TOKENS, task_ids=torch.tensor([task, task])).logits[:, -8:]
    return out


def test_matches_peft_in_every_task() -> None:
    model, theirs = pair()
    seen = []
    for task in range(3):
        set_task(model, task)
        ours, expected = logits(model), theirs_at(theirs, task)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        seen.append(ours)
        weight = torch.randn(expected.shape)
        (ours * weight).sum().backward()
        (expected * weight).sum().backward()
    assert (seen[0] - seen[1]).abs().max() > 0.1
    for mine, other in both(task_table(model), theirs.prompt_encoder["default"]):
        assert mine.grad is not None
        assert other.grad is not None
        assert other.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_folders_go_both_ways(tmp_path: Path) -> None:
    from peft import PeftModel

    model, theirs = pair()
    save_task_prompts(model, tmp_path / "ours", base="small")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "small"
    opened = PeftModel.from_pretrained(transformers_of(tiny()), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_task_prompts(tiny(), tmp_path / "theirs")
    assert len(trained(again)) == 3
    for task in range(3):
        set_task(model, task)
        set_task(again, task)
        torch.testing.assert_close(logits(again), logits(model))
        torch.testing.assert_close(theirs_at(opened, task), logits(model), rtol=1e-4, atol=1e-4)


def test_a_model_is_opened_at_its_task() -> None:
    source = TinyExpert(transforms=(PROMPTS,))
    model = source.open(nowhere()).model
    found = [logits(AtTask(model=source, task=task).open(nowhere()).model) for task in range(3)]
    assert torch.equal(logits(model), found[0])
    set_task(model, 2)
    assert torch.equal(logits(model), found[2])
    assert not torch.equal(found[1], found[2])
    with pytest.raises(ConfigError, match="task 3 has no prompt"):
        AtTask(model=source, task=3).open(nowhere())


def test_all_tasks_start_as_the_shared_prompt() -> None:
    for ranks in (1, 3):
        torch.manual_seed(1)
        model = PromptTuning(tokens=5, encoder=PerTask(tasks=2, ranks=ranks))(tiny())
        table = task_table(model)
        for task in range(2):
            set_task(model, task)
            torch.testing.assert_close(table(), table.table)
        away = (table.V - 1).abs().max()
        assert away == 0 if ranks == 1 else 0.01 < away < 0.1


def test_each_batch_teaches_its_task(tmp_path: Path) -> None:
    """The gradient reaches the factors of the task alone, and the shared prompt."""
    env = chat_env(tmp_path)
    model = PromptTuning(tokens=3, encoder=PerTask(tasks=2))(env.model)
    words = ("warp", "weft")
    mix = TaskMix(
        tasks=tuple(
            Task(name=w, source=Supervised(conversations=Numbered(word=w), per_step=2))
            for w in words
        ),
        draws=1,
    )
    stream, table = mix.open(env), task_table(model)
    tasks = set()
    for _ in range(8):
        (batch,) = next(stream).batches
        model.zero_grad()
        AsTask(objective=CausalLM())(model, batch).total.backward()
        assert table.U.grad is not None
        assert table.table.grad is not None
        assert table.table.grad.abs().max() > 0
        moved = table.U.grad.flatten(1).abs().amax(1) > 0
        assert moved.tolist() == [task == batch.task for task in range(2)]
        tasks.add(batch.task)
    assert tasks == {0, 1}


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = PROMPTS(tiny())
    with pytest.raises(ConfigError, match="task 3 has no prompt: the model was given 3"):
        set_task(model, 3)
    with pytest.raises(ConfigError, match="no prompts of tasks; add the transform PromptTuning"):
        set_task(PromptTuning(tokens=3)(tiny()), 0)
    save_task_prompts(model, tmp_path / "a")
    with pytest.raises(FileFormatError, match="it is for another base"):
        load_task_prompts(tiny(dim=64), tmp_path / "a")
    with pytest.raises(FileFormatError, match="trained on another base"):
        load_task_prompts(tiny(seed=5), tmp_path / "a")
    save_prefix(PromptTuning(tokens=3)(tiny()), tmp_path / "b")
    with pytest.raises(ConfigError, match="holds PROMPT_TUNING, not MULTITASK_PROMPT_TUNING"):
        load_task_prompts(tiny(), tmp_path / "b")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({**whole, "prefix_task_rows": whole["prefix_task_rows"][:2].clone()}, weights)
    with pytest.raises(FileFormatError, match=r"factors \(3, 5, 2\) and \(2, 2, 32\)"):
        load_task_prompts(tiny(), tmp_path / "a")
    save_file({**whole, "more": torch.zeros(1)}, weights)
    with pytest.raises(FileFormatError, match=r"'more'.*not one prompt and its factors"):
        load_task_prompts(tiny(), tmp_path / "a")
