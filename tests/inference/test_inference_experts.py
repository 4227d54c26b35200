"""Experts that stay in the file: the same output, less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.hf_zoo import save
from tiny_generation import byte_tokenizer

from treadle.core.errors import FileFormatError, TreadleError
from treadle.inference.engine import Engine
from treadle.inference.experts import CachedExperts, hit_rate, load_offloaded
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.hub.load import load_model

REQUESTS = [Request((1, 5, 9, 33, n), Sampling(temperature=0.0, max_tokens=9)) for n in range(5)]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe-mixed", "olmoe"])
@pytest.mark.parametrize("experts", [1, 3, 99])
def test_equals_all_in_memory(name: str, experts: int, tmp_path: Path) -> None:
    """To rounding, for a product depends on where its operands lie; at every size of the cache."""
    save(name, tmp_path)
    whole = load_model(tmp_path).model
    some = load_offloaded(tmp_path, experts=experts).model
    tokens = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(
            some.logits(some(tokens)), whole.logits(whole(tokens)), rtol=1e-5, atol=1e-5
        )
    engines = [Engine(model, byte_tokenizer()) for model in (whole, some)]
    expected, found = ([a.tokens for (a,) in e.generate(REQUESTS)] for e in engines)
    assert found == expected
    caches = [m for m in some.modules() if isinstance(m, CachedExperts)]
    assert len(caches) == (2 if "mixed" in name else 3)
    for cache in caches:
        one = sum(3 * t.nbytes for t in next(iter(cache.held.values()))[:1])
        assert len(cache.held) <= min(experts, len(cache.places))
        assert cache.nbytes == len(cache.held) * one
    hits, asked = hit_rate(some)
    assert 0 <= hits < asked
    if experts == 99:  # each expert is read once
        assert asked - hits == sum(len(cache.held) for cache in caches)


def test_the_least_recently_used_expert_goes(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    cache = next(
        m
        for m in load_offloaded(tmp_path, experts=2).model.modules()
        if isinstance(m, CachedExperts)
    )

    def ask(*experts: int) -> None:
        counts = torch.zeros(5, dtype=torch.long)
        counts[list(experts)] = 1
        cache(torch.randn(len(experts), 24), counts)

    ask(0, 1)
    ask(0)
    ask(2)
    assert list(cache.held) == [0, 2]
    ask(1, 2)  # 2 is taken before 1 takes its place or that of 0
    assert (cache.found, cache.asked) == (2, 6)
    assert list(cache.held) == [2, 1]


@pytest.mark.slow
def test_memory_is_that_of_the_experts_held(tmp_path: Path) -> None:
    """In a process of its own: 12 layers of 16 experts, 113 MB, of which one a layer is held."""
    script = """
import json, sys, psutil, torch
from treadle.models.llama import tiny_llama
from treadle.models.decoder import swap
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE
from treadle.inference.experts import load_offloaded
folder, what = sys.argv[1:]
resident = lambda: psutil.Process().memory_info().rss
if what == "write":
    dense = tiny_llama(64, dim=192, layers=12, heads=4, hidden=256, tied=False)
    save_hf(swap(dense, GatedMLP, lambda f: MoE(expert=f, experts=16, top_k=2)).build(), folder)
    raise SystemExit
torch.set_num_threads(1)
with torch.device("meta"):
    tiny_llama(64).build()
tiny_llama(64, dim=192, layers=1, heads=4).build()(torch.arange(40))
before = resident()
load = load_model if what == "whole" else lambda f: load_offloaded(f, experts=1)
with torch.inference_mode():
    model = load(folder).model
    for _ in range(3):
        model(torch.arange(40))
print(json.dumps((resident() - before) / 1e6))
"""

    def run(what: str) -> str:
        command = [sys.executable, "-c", script, str(tmp_path), what]
        environment = {"PYTHONPATH": "src", "PATH": "/usr/bin"}
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run("write")
    assert json.loads(run("whole")) > 100
    assert json.loads(run("some")) < 50


def test_what_cannot_be_offloaded_is_told(tmp_path: Path) -> None:
    save("llama", tmp_path / "dense")
    with pytest.raises(TreadleError, match="has no mixture of experts"):
        load_offloaded(tmp_path / "dense", experts=2)
    with pytest.raises(TreadleError, match="read one by one from a Hugging Face folder"):
        load_offloaded(tmp_path / "model.gguf", experts=2)
    save("mixtral", tmp_path / "mixtral")
    with pytest.raises(TreadleError, match="keep one or more"):
        load_offloaded(tmp_path / "mixtral", experts=0)
    some = load_offloaded(tmp_path / "mixtral", experts=1, dtype=torch.float64).model
    weights = tmp_path / "mixtral" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(FileFormatError, match="cut off while it was in use"):
        some(torch.arange(5))


def test_shards_and_half_precision(tmp_path: Path) -> None:
    theirs = save("qwen3-moe", tmp_path / "base")
    theirs.bfloat16().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 61, (2, 7))
    for dtype in (None, torch.float32):
        whole = load_model(tmp_path / "half", dtype=dtype).model
        some = load_offloaded(tmp_path / "half", experts=2, dtype=dtype).model
        with torch.no_grad():
            torch.testing.assert_close(some(tokens), whole(tokens))
