"""Activation checkpointing: equal gradients to the bit, less memory, and errors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.tiny import documents, tiny_model

from treadle.core.errors import ConfigError
from treadle.data.batch import assemble
from treadle.models.decoder import DecoderModel
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.train.recompute import OffloadActivations, Recompute, SelectiveRecompute, keep_products

TRANSFORMS = [
    Recompute(),
    Recompute(every=2),
    SelectiveRecompute(),
    OffloadActivations(least=0),
]


class Adapter(nn.Module):
    """A frozen layer with a trained low-rank path and dropout, like LoRA."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, inner.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(inner.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + nn.functional.dropout(x, 0.3) @ self.a.T @ self.b.T
        return y


def adapted(model: DecoderModel) -> DecoderModel:
    model.requires_grad_(False)
    for block in model.blocks:
        block.mixer.q = Adapter(block.mixer.q)
        block.ffn.down = Adapter(block.ffn.down)
    return model


def gradients(model: DecoderModel, *, mixed: bool) -> list[Tensor | None]:
    torch.manual_seed(5)
    batch = assemble(documents(0, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = CausalLM()(model, batch)
    out.total.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_equal_bit_for_bit(transform: Transform, mixed: bool, lora: bool) -> None:
    """On uneven packed documents, whose context shares masks between blocks."""
    model = tiny_model(layers=3)
    if lora:
        model = adapted(model)
    expected = gradients(copy.deepcopy(model), mixed=mixed)
    found = gradients(transform(copy.deepcopy(model)), mixed=mixed)
    assert any(g is not None for g in expected)
    for a, b in zip(expected, found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def count_runs(model: DecoderModel) -> list[int]:
    """How often each block's feed-forward runs in one forward and backward."""
    runs = [0] * len(model.blocks)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return hook

    for index, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(count(index))
    gradients(model, mixed=False)
    return runs


def test_which_blocks_run_again() -> None:
    assert count_runs(tiny_model(layers=3)) == [1, 1, 1]
    assert count_runs(Recompute()(tiny_model(layers=3))) == [2, 2, 2]
    assert count_runs(Recompute(every=2)(tiny_model(layers=3))) == [2, 1, 2]


def test_selective_keeps_matrix_products() -> None:
    """In backward no matrix product of the forward pass is made again, but the rest is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.mm = self.other = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            self.mm, self.other = self.mm + product, self.other + (not product)
            return func(*args, **(kwargs or {}))

    def counted(model: DecoderModel) -> tuple[int, int]:
        with Counter() as counter:
            gradients(model, mixed=False)
        return counter.mm, counter.other

    plain = counted(tiny_model())
    full = counted(Recompute()(tiny_model()))
    selective = counted(SelectiveRecompute()(tiny_model()))
    assert full[0] > plain[0]
    assert selective[0] == plain[0]
    assert selective[1] > plain[1]
    assert keep_products(None, torch.ops.aten.mm.default).name == "MUST_SAVE"


def test_names_copies_and_inference_are_as_before() -> None:
    plain, model = tiny_model(), Recompute()(tiny_model())
    assert list(model.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].ffn.down.weight.zero_()
        tokens = torch.arange(5)
        assert torch.equal(model(tokens), plain(tokens))
        assert not torch.equal(twin(tokens), plain(tokens)), "a copy runs its own weights"


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Recompute: Linear has no blocks"):
        Recompute()(nn.Linear(2, 2))


PEAK = """
import re, torch
torch.set_num_threads(1)
from train.tiny import VOCAB
from treadle.data.batch import Piece, assemble
from treadle.models.decoder import Decoder
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.objectives.causal import CausalLM
from treadle.train.recompute import *

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

block = Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=512))
batch = assemble([Piece([3] * 256, [True] * 256)] * 8)
for transform in (lambda m: m, SelectiveRecompute(), Recompute()):
    model = transform(Decoder(vocab=VOCAB, dim=128, context=512, blocks=(block,) * 8).build())
    CausalLM()(model, assemble([Piece([3] * 9, [True] * 9)])).total.backward()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    CausalLM()(model, batch).total.backward()
    print((status("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory peak")
def test_peak_memory_falls() -> None:
    """MiB by which one forward and backward raises the peak of the process."""
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join((str(here.parent / "src"), str(here)))
    # Each large block is its own mapping, so that what is freed leaves the process at once.
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", PEAK]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    plain, selective, full = map(int, ran.stdout.split())
    print(f"peak MiB: plain {plain}, selective {selective}, full {full}")
    assert full < 0.4 * plain
    assert full < selective < 0.9 * plain
