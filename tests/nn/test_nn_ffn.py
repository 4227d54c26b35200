"""Feed-forward networks against those of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from treadle.kernels.gated import Activation, activate
from treadle.nn.ffn.ffn import MLP, GatedMLP

DIM, HIDDEN = 12, 20


def llama(bias: bool) -> nn.Module:
    return LlamaMLP(
        transformers.LlamaConfig(
            hidden_size=DIM, intermediate_size=HIDDEN, num_attention_heads=2, mlp_bias=bias
        )
    )


def gemma() -> nn.Module:
    return GemmaMLP(transformers.GemmaConfig(hidden_size=DIM, intermediate_size=HIDDEN))


def gpt2(act: str) -> nn.Module:
    return GPT2MLP(
        HIDDEN, transformers.GPT2Config(n_embd=DIM, activation_function=act, resid_pdrop=0.0)
    )


class OPTFeedForward(nn.Module):
    """The two layers of OPT, which transformers keeps in its block."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.OPTConfig(hidden_size=DIM, ffn_dim=HIDDEN, num_attention_heads=2)
        layer = OPTDecoderLayer(config, layer_idx=0)
        self.fc1, self.fc2, self.act = layer.fc1, layer.fc2, layer.activation_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


CASES = {
    "swiglu": (GatedMLP(hidden=HIDDEN), lambda: llama(bias=False)),
    "swiglu-bias": (GatedMLP(hidden=HIDDEN, bias=True), lambda: llama(bias=True)),
    "geglu": (GatedMLP(hidden=HIDDEN, activation="gelu_tanh"), gemma),
    "gelu-tanh": (MLP(hidden=HIDDEN, activation="gelu_tanh"), lambda: gpt2("gelu_new")),
    "gelu": (MLP(hidden=HIDDEN, activation="gelu"), lambda: gpt2("gelu")),
    "relu2": (MLP(hidden=HIDDEN, activation="relu2"), lambda: gpt2("relu2")),
    "silu": (MLP(hidden=HIDDEN, activation="silu"), lambda: gpt2("silu")),
    "relu": (MLP(hidden=HIDDEN, activation="relu"), OPTFeedForward),
}
NAMES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "c_fc": "up",
    "c_proj": "down",
    "fc1": "up",
    "fc2": "down",
}


@pytest.mark.parametrize("name", CASES)
def test_ffn_matches_transformers(name: str) -> None:
    config, make = CASES[name]
    torch.manual_seed(0)
    theirs, ours = make().double(), config.build(DIM).double()
    own = dict(ours.named_parameters())
    pairs = []
    with torch.no_grad():
        for their_name, parameter in theirs.named_parameters():
            layer, kind = their_name.split(".")
            parameter.copy_(torch.randn_like(parameter))
            conv1d = layer.startswith("c_") and kind == "weight"
            target = own.pop(f"{NAMES[layer]}.{kind}")
            target.copy_(parameter.T if conv1d else parameter)
            pairs.append((parameter, target, conv1d))
    assert not own
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), theirs(x)
    assert_close(y, expected)
    wave = torch.randn_like(y)
    hf = torch.autograd.grad((expected * wave).sum(), [x, *(p for p, _, _ in pairs)])
    mine = torch.autograd.grad((y * wave).sum(), [x, *(p for _, p, _ in pairs)])
    assert_close(mine[0], hf[0])
    for a, b, (_, _, turned) in zip(mine[1:], hf[1:], pairs, strict=True):
        assert_close(a, b.T if turned else b)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("gelu_tanh", "gelu_new"),
        ("silu", "silu"),
        ("relu2", "relu2"),
    ],
)
def test_activations_match_transformers(ours: Activation, theirs: str) -> None:
    x = torch.linspace(-6, 6, 301, dtype=torch.float64)
    assert_close(activate(x, ours), ACT2FN[theirs](x))
