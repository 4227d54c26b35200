"""Where weights live, from the command line: adapters, experts in the file, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.test_cli_models import train_tokenizer, treadle

from treadle.models.decoder import swap
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE
from treadle.peft.adapter import adapted, merge
from treadle.peft.files import save_adapter
from treadle.peft.lora import LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    config = tiny_llama(tokenizer.vocab_size, dim=64, layers=2, kv_heads=2, hidden=96)
    save_hf(config.replace(std=0.3).build(), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LoRA(rank=4)(load_model(base).model)
        with torch.no_grad():
            for layer in adapted(model).values():
                layer.B.normal_(std=0.3)
        folders.append(tmp_path_factory.mktemp("adapter"))
        folders[-1].rmdir()
        save_adapter(model, folders[-1])
        merged = folders[-1].with_suffix(".merged")
        save_hf(merge(model), merged)
        train_tokenizer().save(merged)
    return folders


def rows(*arguments: str) -> list[dict[str, object]]:
    done = treadle("generate", *arguments, "--json", "--max-tokens", "6")
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_command_answers_by_each_adapter(base: Path, adapters: list[Path]) -> None:
    options = [word for folder in adapters for word in ("--adapter", str(folder))]
    found = rows(str(base), "the loom", *options)
    assert [row["adapter"] for row in found] == [str(folder) for folder in adapters]
    for row, folder in zip(found, adapters, strict=True):
        (alone,) = rows(str(folder.with_suffix(".merged")), "the loom")
        assert row["text"] == alone["text"]
        assert row["logprob"] == pytest.approx(alone["logprob"], abs=1e-3)
    assert found[0]["text"] != found[1]["text"]


def test_generate_says_what_an_adapter_lacks(base: Path, tmp_path: Path) -> None:
    done = treadle("generate", str(base), "the", "--adapter", str(tmp_path))
    assert done.exit_code == 2
    assert "no adapter_config.json; name a folder that holds an adapter" in done.stderr


def test_experts_stay_in_the_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    dense = tiny_llama(tokenizer.vocab_size, dim=32, layers=2, heads=4)
    tree = swap(dense, GatedMLP, lambda ffn: MoE(expert=ffn, experts=5, top_k=2))
    save_hf(tree.replace(std=0.3).build(), tmp_path, family="mixtral")
    tokenizer.save(tmp_path)
    whole = rows(str(tmp_path), "the loom")
    done = treadle(
        *("generate", str(tmp_path), "the loom", "--json", "--max-tokens", "6", "--experts", "2")
    )
    (some,) = (json.loads(line) for line in done.stdout.splitlines())
    assert some == pytest.approx(whole[0])
    assert "experts were in memory)" in done.stderr
    both = treadle("generate", str(tmp_path), "a", "--experts", "2", "--tensor-parallel", "2")
    assert both.exit_code == 2
    assert "leave out --tensor-parallel" in both.stderr


def test_tensor_parallel_needs_torchrun(base: Path) -> None:
    done = treadle("generate", str(base), "the", "--tensor-parallel", "2")
    assert done.exit_code == 2
    assert "torchrun --nproc-per-node=2 -m treadle" in done.stderr


TRAINED = """
kind: Pipeline
name: mine
steps:
- kind: Run
  name: first
  model: {{kind: Pretrained, name: {base}}}
  transforms: [{{kind: LoRA, rank: 2}}]
  source:
    kind: Supervised
    per_step: 2
    conversations: {{kind: ConversationFiles, path: talks.jsonl}}
  objective: {{kind: CausalLM}}
  optimizer: {{kind: AdamW, lr: 0.05}}
  fit: {{kind: Fit, steps: 3}}
"""


def test_an_adapter_is_exported_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run trained, exported and put on the base again, says what the run says."""
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "a loom?"}, {"role": "assistant", "content": "wool"}]
    Path("talks.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 6))
    Path("mine.yaml").write_text(TRAINED.format(base=base))
    assert treadle("run", "mine.yaml").exit_code == 0
    done = treadle("export", "runs/mine", "--format", "peft", "--to", "adapter")
    assert done.exit_code == 0, done.output
    (theirs,) = rows("runs/mine", "the loom")
    (ours,) = rows(str(base), "the loom", "--adapter", "adapter")
    assert ours.pop("adapter") == "adapter"
    assert ours == pytest.approx(theirs, abs=1e-3)
    (plain,) = rows(str(base), "the loom")
    assert plain["logprob"] != pytest.approx(theirs["logprob"], abs=1e-3)
    done = treadle("export", str(base), "--format", "peft")
    assert done.exit_code == 2
    assert "the model has no adapters to save" in done.stderr
