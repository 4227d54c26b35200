"""When the native kernels are chosen, and what is said where they are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer

from treadle.core.errors import TreadleError
from treadle.inference.limits import EngineConfig
from treadle.inference.native_choice import native_engine, native_pages, native_support
from treadle.inference.native_memory import Recycled
from treadle.inference.native_runner import NativeRunner
from treadle.inference.native_weights import StoredFile
from treadle.inference.request import Request
from treadle.inference.runner import Batch
from treadle.inference.sampling import Sampling
from treadle.kernels.compiler import COMPILERS
from treadle.models.decoder import Decoder, LinearHead, swap
from treadle.models.gpt2 import gpt2
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.gguf_write import write_gguf
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.models.llama import tiny_llama
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
TINY = tiny_llama(203, dim=96, layers=2, heads=6, kv_heads=2, hidden=160, context=128)
WIDE = tiny_llama(203, dim=256, layers=2, heads=4, kv_heads=2, hidden=256, context=128)
NO_WORDS = {"tokenizer.ggml.model": "no_vocab"}


def file_with(folder: Path, format: str, decoder: Decoder = TINY) -> Path:
    torch.manual_seed(0)
    file = folder / f"{format}.gguf"
    save_gguf(decoder.replace(std=0.15).build(), file, format=format, metadata=NO_WORDS)
    return file


@needs_compiler
@pytest.mark.parametrize("format", ["Q4_0", "Q5_1", "Q8_0"])
def test_files_in_few_bits_run_as_stored(tmp_path: Path, format: str) -> None:
    found = native_support(file_with(tmp_path, format))
    assert found.weights is not None
    assert f"{format} " in found.why.replace(",", " ")
    assert found.why.endswith("as stored")


@needs_compiler
def test_what_stands_against_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native_support(file_with(tmp_path, "F16"))
    assert found.weights is None
    assert "is stored as F16" in found.why
    folder = tmp_path / "folder"
    save_hf(TINY.build(), folder)
    assert native_support(folder).why == "its weights are not stored in few bits"
    small = gpt2(dim=64, layers=1, heads=4, vocab=203, context=32)
    other = native_support(file_with(tmp_path, "Q8_0", small))
    assert other.weights is None
    assert "the native path runs models built like" in other.why
    mixture = swap(TINY, GatedMLP, lambda f: MoE(expert=f, experts=3, top_k=2))
    mixed = native_support(file_with(tmp_path, "Q4_1", mixture))
    assert mixed.weights is None
    assert "the feed-forward MoE; use the torch path" in mixed.why
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in native_support(file_with(tmp_path, "Q4_0")).why
    with pytest.raises(TreadleError, match="no such file"):
        native_support(tmp_path / "none.gguf")


@needs_compiler
@pytest.mark.parametrize("format", ["Q4_K", "Q5_K", "Q6_K", "Q4_1"])
def test_packed_weights_are_the_numbers_of_the_file(tmp_path: Path, format: str) -> None:
    """Rows of q and k lie in another order than ours; embeddings are looked up unpacked."""
    file = file_with(tmp_path, format, WIDE.replace(head=LinearHead()))
    runner = NativeRunner.open(file, pages=4)
    dense = load_model(file).model
    names = ["embedding", "blocks.0.mixer.q", "blocks.0.mixer.k", "blocks.0.mixer.v"]
    assert format in runner.formats
    for matrix, name in zip(runner.matrices, names, strict=False):
        weight = dense.get_parameter(f"{name}.weight")
        for row in (0, 1, 17, len(weight) - 1):
            assert torch.equal(matrix.row(row), weight[row])
    head = dense.get_parameter("head.weight")
    assert torch.equal(runner.matrices[-1].row(100), head[100])


@needs_compiler
def test_bytes_of_a_file_are_given_back_and_still_there(tmp_path: Path) -> None:
    """Packing drops the file's pages from memory; reading them again finds the same."""
    name, weights = "w", torch.randn(64, 4096)
    write_gguf(tmp_path / "w.gguf", {"general.architecture": "llama"}, [(name, weights, "Q8_0")])
    file = GGUFFile.open(tmp_path / "w.gguf")
    before = file.raw(name).clone()
    file.release(name)
    assert torch.equal(file.raw(name), before)
    with pytest.raises(TreadleError, match="no tensor `v`"):
        file.release("v")


@needs_compiler
def test_an_engine_on_native_kernels(tmp_path: Path) -> None:
    """Greedy tokens are those of the runner, one pass at a time."""
    weights = StoredFile(file_with(tmp_path, "Q8_0", TINY.replace(vocab=257)))
    config = EngineConfig(cache_tokens=200, slots=2)
    threads = torch.get_num_threads()
    try:
        engine = native_engine(weights, byte_tokenizer(), config)
    finally:
        torch.set_num_threads(threads)
    assert engine.runner.pages == native_pages(weights, config) == 7
    request = Request((5, 6, 7), Sampling(max_tokens=6, temperature=0.0))
    ((done,),) = engine.generate([request])
    runner = NativeRunner.open(tmp_path / "Q8_0.gguf", pages=2)
    tokens = [5, 6, 7]
    for _ in range(6):
        logits = runner.run(Batch(tokens, [len(tokens)], [0], [[0, 1]], [1]))
        tokens.append(int(logits.argmax()))
    assert list(done.tokens) == tokens[3:]


def test_pages_fill_a_quarter_of_memory_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = StoredFile(file_with(tmp_path, "Q8_0"))
    assert native_pages(weights, EngineConfig(slots=3)) == 3 * 4
    page = 2 * 2 * 2 * 32 * 16 * 2  # layers, heads, keys and values, tokens, width, bytes

    class Small:
        total = 4 * 6 * page

    monkeypatch.setattr("psutil.virtual_memory", lambda: Small)
    assert native_pages(weights, EngineConfig(slots=3)) == 6
    monkeypatch.setattr(Small, "total", 4)
    assert native_pages(weights, EngineConfig(slots=3)) == 4


def test_memory_is_given_again_when_its_last_holder_is_gone() -> None:
    recycled = Recycled()
    first = recycled.take(4, 8)
    second = recycled.take(4, 8)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    row = first[1]
    del first
    third = recycled.take(4, 8)
    assert third.data_ptr() not in places
    row.fill_(1.0)
    del row
    assert recycled.take(3, 8).data_ptr() in places - {second.data_ptr()}
    assert recycled.take(400, 8).shape == (400, 8)
