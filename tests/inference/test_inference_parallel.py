"""A model over two processes: logits and text are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference.parallel_workers import CACHES, TEXTS, models, over_two, texts
from tiny_generation import byte_tokenizer, tiny_model
from train.processes import launch

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.runner import Batch
from treadle.inference.shards import shard, span
from treadle.inference.tensor_parallel import join
from treadle.inference.torch_runner import TorchRunner
from treadle.models.hub.save import save_hf
from treadle.nn.alibi import ALiBi
from treadle.peft.lora import LoRA


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    launch(over_two, 2, tmp_path, tmp_path)
    for name, model in models().items():
        said = json.loads((tmp_path / f"{name}.json").read_text())
        runner = TorchRunner(model, pages=40, page=4)
        counts, tables = (
            [len(t) for t in TEXTS],
            [[12 * i + p for p in range(12)] for i in range(3)],
        )
        tokens = [t for text in TEXTS for t in text]
        first = runner.run(Batch(tokens, counts, [0] * 3, tables, counts))
        second = runner.run(Batch([1, 2, 3, 4], [1, 2, 1], counts, tables, [1, 2, 1]))
        torch.testing.assert_close(
            torch.tensor(said["logits"]), torch.cat([first, second]), atol=2e-4, rtol=2e-4
        )
        assert said["texts"] == texts(Engine(models()[name], byte_tokenizer())), name
        held = [json.loads((tmp_path / f"{name}-held-{r}.json").read_text()) for r in (0, 1)]
        assert max(held) < 0.75, "a process holds little more than its part"
        assert sum(held) < 1.2

    for cache in CACHES:
        said = json.loads((tmp_path / f"{type(cache).__name__}.json").read_text())
        runner = TorchRunner(tiny_model(), pages=40, page=4, cache=cache)
        engine = Engine.of_runner(runner, byte_tokenizer(), EngineConfig(cache_tokens=160))
        assert said == texts(engine), type(cache).__name__


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_generates(tmp_path: Path) -> None:
    save_hf(tiny_model(), tmp_path)
    byte_tokenizer().save(tmp_path)
    command = ["-m", "treadle", "generate", str(tmp_path), "loom", "--max-tokens", "9"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": "src"}

    def said(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert said(*torchrun, *command, "--tensor-parallel", "2") == said(*command)


@pytest.mark.parametrize(("count", "size"), [(9, 2), (3, 3), (7, 4), (257, 2)])
def test_parts_are_whole_and_even(count: int, size: int) -> None:
    parts = [span(count, rank, size) for rank in range(size)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_what_cannot_be_cut_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TreadleError, match=r"`blocks.0.mixer` has 2 groups of heads.*at most 2"):
        shard(tiny_model(), 0, 3)
    with pytest.raises(TreadleError, match=r"`blocks.0.mixer.q` is a LoRALinear.*merge"):
        shard(LoRA(rank=2)(tiny_model()), 0, 2)
    with pytest.raises(TreadleError, match=r"torchrun --nproc-per-node=2"):
        join(2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(TreadleError, match="over 2 processes, but 4 run"):
        join(2)


def test_biases_of_distance_go_with_their_heads() -> None:
    slopes = ALiBi().slopes(4)
    model = models()["alibi"]
    assert slopes is not None
    assert shard(model, 1, 2).blocks[0].mixer.rule.slopes == slopes[2:]
