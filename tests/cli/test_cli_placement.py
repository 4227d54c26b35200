"""Where weights live, from the command line: adapters, experts in the file, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.test_cli_models import train_tokenizer, treadle

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import standard
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import swap
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.source import Pretrained
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE
from treadle.peft.adapter import adapted, merge
from treadle.peft.files import save_adapter
from treadle.peft.folders import WithAdapter, load_tuned, save_tuned
from treadle.peft.lora import LoRA
from treadle.peft.multitask_prompt import PerTask, set_task, task_table
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prompt import PromptTuning
from treadle.tokenizers.tokenizer import Tokenizer


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


def test_a_prefix_answers_beside_an_adapter(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """In an engine of its own, over the same weights; in the order of the command."""
    model = PrefixTuning(tokens=3)(load_model(base).model)
    save_tuned(model, tmp_path / "prefix")
    folders = [str(adapters[0]), str(tmp_path / "prefix"), str(adapters[1])]
    found = rows(str(base), "the loom", *(w for folder in folders for w in ("--adapter", folder)))
    assert [row["adapter"] for row in found] == folders
    for row, folder in zip(found, folders, strict=True):
        (alone,) = rows(str(base), "the loom", "--adapter", folder)
        assert row == pytest.approx(alone, abs=1e-3)
    assert len({row["logprob"] for row in found}) == 3


def test_a_prompt_of_several_tasks_is_named(base: Path, tmp_path: Path) -> None:
    model = PromptTuning(tokens=3, encoder=PerTask(tasks=2))(
        load_model(base, dtype=torch.float32).model
    )
    with torch.no_grad():
        task_table(model).U[1] *= -2
    folder = str(tmp_path / "prompts")
    save_tuned(model, folder)
    told = [rows(str(base), "the loom", "--adapter", f"{folder}#{k}")[0]["logprob"] for k in (0, 1)]
    for k in (0, 1):
        set_task(model, k)
        engine = Engine(model, Tokenizer.load(base))
        prompt = tuple(engine.tokenizer.encode("the loom", add_special=True))
        ((expected,),) = engine.generate([Request(prompt, Sampling(temperature=0.0, max_tokens=6))])
        assert sum(expected.logprobs) == pytest.approx(told[k], abs=1e-3)
    assert told[0] != pytest.approx(told[1], abs=1e-2)
    for wrong, said in (
        (folder, f"prompts of 2 tasks; name one, {folder}#0 to {folder}#1"),
        (f"{folder}#2", "task 2 has no prompt: the model was given 2"),
    ):
        done = treadle("generate", str(base), "the", "--adapter", wrong)
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())


def test_a_run_begins_with_a_folder(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    source = WithAdapter(model=Pretrained(name=str(base)), folder=str(adapters[0]))
    nowhere = Workspace(tmp_path, tmp_path, Pipeline(name="none", steps=()), standard())
    model = source.open(nowhere).model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{leaf}" for name in adapted(model) for leaf in ("A", "B")
    }
    with pytest.raises(ConfigError, match="LORA has no tasks; leave out #1"):
        load_tuned(load_model(base).model, f"{adapters[0]}#1")


def test_a_prompt_finds_its_adapter(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    folders = [str(folder) for folder in adapters]
    examples = tmp_path / "examples.jsonl"
    texts = ("the loom and the weft", "12 34 56 78"), ("a loom of wool", "90 12 78 31")
    examples.write_text(
        "\n".join(
            json.dumps({"adapter": folder, "prompt": text})
            for pair in texts
            for folder, text in zip(folders, pair, strict=True)
        )
    )
    options = [*(w for f in folders for w in ("--adapter", f)), "--route", str(examples)]
    for prompt, folder in zip(("the weft and the loom", "56 31 90 34"), folders, strict=True):
        assert rows(str(base), prompt, *options) == rows(str(base), prompt, "--adapter", folder)
    for row, said in (
        ({"adapter": folders[0]}, "row 1: write `adapter` and `prompt`, both texts"),
        ({"adapter": "none", "prompt": "a"}, "row 1: no adapter `none`"),
        ({"adapter": folders[0], "prompt": "a"}, "has no examples to be known by"),
    ):
        examples.write_text(json.dumps(row))
        done = treadle("generate", str(base), "the", *options)
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
    done = treadle("generate", str(base), "the", "--route", str(examples))
    assert "no adapter `" in done.stderr


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


def test_torchrun_has_to_start_as_many(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
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
  transforms: [{transform}]
  source:
    kind: Supervised
    per_step: 2
    conversations: {{kind: ConversationFiles, path: talks.jsonl}}
  objective: {{kind: CausalLM}}
  optimizer: {{kind: AdamW, lr: 0.05}}
  fit: {{kind: Fit, steps: 3}}
"""


@pytest.mark.parametrize(
    "transform",
    [
        "{kind: LoRA, rank: 2}",
        "{kind: PrefixTuning, tokens: 3}",
        "{kind: PromptTuning, tokens: 3, encoder: {kind: TanhNetwork}}",
    ],
)
def test_an_adapter_is_exported_alone(
    transform: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run trained, exported and put on the base again, says what the run says."""
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "a loom?"}, {"role": "assistant", "content": "wool"}]
    Path("talks.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 6))
    Path("mine.yaml").write_text(TRAINED.format(base=base, transform=transform))
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
