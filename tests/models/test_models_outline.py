"""Loading without waste: laid out without values, mapped without copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.hf_zoo import ZOO, build

from treadle.models.families import family_of_hf
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.outline import outline


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "gemma3", "qwen2-moe"])
def test_an_outline_has_all_but_the_values(name: str) -> None:
    assert name in ZOO
    config = build(name).config.to_dict()
    decoder = family_of_hf(config).huggingface.read(config)
    full, empty = decoder.build(), outline(decoder)
    assert str(empty) == str(full)
    for (name, a), (other, b) in zip(
        full.named_parameters(), empty.named_parameters(), strict=True
    ):
        assert (name, a.shape, a.dtype) == (other, b.shape, b.dtype)
        assert b.is_meta
    assert (full.head.weight is full.embedding.weight) == (
        empty.head.weight is empty.embedding.weight
    )


def mappings(file: Path) -> list[range]:
    """Where a file lies in this process's memory."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            first, last = (int(n, 16) for n in line.split(" ")[0].split("-"))
            found.append(range(first, last))
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """In the file's dtype; the model computes the same, and a change does not reach the file."""
    torch.manual_seed(0)
    model = tiny_llama(64, dim=32, layers=2, heads=4, kv_heads=2).build().eval()
    save_hf(model, tmp_path)
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    loaded = load_model(tmp_path, dtype=torch.float32).model
    places = mappings(file)
    for name, parameter in loaded.named_parameters():
        assert any(parameter.data_ptr() in place for place in places), name
    tokens = torch.randint(0, 64, (2, 9))
    assert torch.equal(loaded(tokens), model(tokens))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert file.read_bytes() == before
    other = load_model(tmp_path, dtype=torch.bfloat16).model
    assert not any(p.data_ptr() in place for p in other.parameters() for place in mappings(file))


def test_loading_imports_neither_the_compiler_nor_training(tmp_path: Path) -> None:
    save_hf(tiny_llama(64, dim=32, layers=1, heads=4).build(), tmp_path)
    script = f"""
import sys
from treadle.cli.models import open_model
open_model({str(tmp_path)!r})
heavy = {{"torch._dynamo", "sympy", "torch.distributed.tensor", "treadle.train.fit"}}
print(sorted(heavy & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.strip() == "[]"
