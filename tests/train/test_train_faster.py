"""Faster layers are the same layers: outputs, gradients, names; with adapters and in any order."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_generation import tiny_model

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, DecoderModel
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm
from treadle.peft.lora import LoRA
from treadle.train import faster
from treadle.train.faster import CompileLayers, TritonKernels


def gradients(model: DecoderModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss on all logits, with the logits themselves."""
    model.zero_grad()
    logits = model.logits(model(tokens))
    (logits.log_softmax(-1)[..., 7].sum()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def adapted() -> DecoderModel:
    model = LoRA(rank=2)(tiny_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    return model.train()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules compile as ever, forward and backward, but without Inductor's C++."""
    seen: list[str] = []
    real = torch.nn.Module.compile

    def compile_(self: torch.nn.Module, **settings: object) -> None:
        seen.append(type(self).__name__)
        real(self, backend="aot_eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    return seen


def test_compiled_layers_equal_their_definition(traced: list[str]) -> None:
    """Batches of several sizes run through the one graph that any size has."""
    plain = adapted()
    fast = CompileLayers()(copy.deepcopy(plain))
    assert traced == ["GatedMLPLayer"] * 2
    assert fast.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.utils.counters.clear()
    for size in (9, 23, 14, 40):
        tokens = torch.randint(0, 257, (size,))
        torch.testing.assert_close(
            gradients(fast, tokens), gradients(plain, tokens), atol=1e-4, rtol=1e-4
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_triton_kernels_train_the_same_model() -> None:
    pytest.importorskip("triton")
    plain = adapted()
    fast = TritonKernels()(copy.deepcopy(plain))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.randint(0, 257, (11,))
    found = gradients(fast, tokens)
    exact = gradients(copy.deepcopy(plain).double(), tokens)
    for name, wanted in exact.items():  # either is 2e-4 of the largest away where softmax is sharp
        largest = float(wanted.abs().max())
        torch.testing.assert_close(found[name].double(), wanted, atol=3e-4 * largest, rtol=0.0)
    norms = [m for m in fast.modules() if hasattr(m, "kernel")]
    assert {m.kernel.__module__ for m in norms} == {
        "treadle.kernels.gpu.rms_norm",
        "treadle.kernels.gpu.gated",
    }


def test_what_cannot_be_made_faster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(mixer=Attention(heads=2), ffn=MLP(hidden=8), norm=LayerNorm())
    model = Decoder(vocab=9, dim=8, context=8, blocks=(block,), norm=LayerNorm()).build()
    with pytest.raises(ConfigError, match="CompileLayers: target `fnn` matches no layer"):
        CompileLayers(targets=("fnn",))(model)
    monkeypatch.setattr(faster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'treadle\[gpu\]'"):
        TritonKernels()(model)


def test_a_model_without_such_layers_is_refused() -> None:
    pytest.importorskip("triton")
    block = Block(mixer=Attention(heads=2), ffn=MLP(hidden=8), norm=LayerNorm())
    model = Decoder(vocab=9, dim=8, context=8, blocks=(block,), norm=LayerNorm()).build()
    with pytest.raises(ConfigError, match="neither RMSNorm nor GatedMLP"):
        TritonKernels()(model)
