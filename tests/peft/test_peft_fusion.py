"""AdapterFusion beside its formula written out, and what must follow from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_models import TinyExpert, nowhere
from peft_pair import logits, perturbed, tiny, trained

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.bottleneck import Bottleneck, BottleneckLayer, Parallel
from treadle.peft.compacter import Kronecker
from treadle.peft.fusion import AdapterFusion, FusionLayer
from treadle.peft.lora import LoRA

SERIAL = Bottleneck(width=4, targets=("ffn",))
EXPERTS = (
    TinyExpert(transforms=(SERIAL.replace(scale=2.0),), seed=1),
    TinyExpert(transforms=(SERIAL.replace(width=6, connection=Parallel()),), seed=2),
    TinyExpert(transforms=(SERIAL.replace(width=8, projection=Kronecker()),), seed=3),
)


def fused(*experts: TinyExpert) -> DecoderModel:
    return AdapterFusion(experts=experts).open(nowhere()).model


def test_matches_the_formula() -> None:
    """One layer with all that it may read; outputs and gradients of Q, K, V and the input."""
    model = fused(*EXPERTS)
    layer = adapted(model)["blocks.1.ffn"]
    assert isinstance(layer, FusionLayer)
    x = torch.randn(5, 32, requires_grad=True)
    start = layer(x)
    y = layer.base(x)
    z = []
    for place, (expert, scale) in enumerate(zip(EXPERTS, (2.0, 1.0, 1.0), strict=True)):
        part = adapted(expert.open(nowhere()).model)["blocks.1.ffn"]
        assert isinstance(part, BottleneckLayer)
        z.append(scale * part.U(F.relu(part.D(x if place == 1 else y))))
    mean = torch.stack(z).mean(0)  # small Q and K: nearly equal shares
    assert (start - y - mean).norm() < 0.05 * mean.norm()
    perturbed(model, size=0.3)
    rows = []
    for n in range(5):
        query = layer.Q @ y[n]
        scores = torch.stack([query @ (layer.K @ each[n]) for each in z])
        shares = torch.exp(scores) / torch.exp(scores).sum()
        heard = sum(s * (layer.V @ each[n]) for s, each in zip(shares, z, strict=True))
        rows.append(y[n] + heard)
    expected, ours = torch.stack(rows), layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected.shape)
    learned = (layer.Q, layer.K, layer.V, x)
    mine = torch.autograd.grad((ours * weight).sum(), learned)
    theirs = torch.autograd.grad((expected * weight).sum(), learned)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_equal_adapters_fuse_to_that_adapter() -> None:
    """Whatever Q and K are: the shares sum to one, and V starts as the identity."""
    model = fused(EXPERTS[0], EXPERTS[0])
    for name, parameter in trained(model).items():
        if not name.endswith("V"):
            torch.nn.init.normal_(parameter)
    alone = logits(EXPERTS[0].open(nowhere()).model)
    assert (alone - logits(tiny())).abs().max() > 0.1
    torch.testing.assert_close(logits(model), alone, rtol=1e-4, atol=1e-4)


def test_only_attention_trains_and_it_can_be_switched_off() -> None:
    model = fused(*EXPERTS)
    assert {name.rpartition(".")[2] for name in trained(model)} == {"Q", "K", "V"}
    assert len(trained(model)) == 6
    assert not any(buffer.requires_grad for buffer in model.buffers())
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
    LoRA(rank=2, targets=("q",))(model)
    assert {n.rpartition(".")[2] for n in trained(model)} == {"Q", "K", "V", "A", "B"}
    with pytest.raises(ConfigError, match="fused adapters are not linear"):
        merge(fused(*EXPERTS))


def test_it_learns_which_adapter_to_listen_to() -> None:
    """The target is what one of the adapters does: fusion comes nearer than their mean."""
    torch.manual_seed(0)
    target = logits(EXPERTS[1].open(nowhere()).model).detach()
    model = fused(*EXPERTS)
    optimizer = torch.optim.Adam(trained(model).values(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = (logits(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_experts_must_fit() -> None:
    both = TinyExpert(transforms=(Bottleneck(width=4),))
    with pytest.raises(
        ConfigError, match=r"experts 1 and 2 do not adapt the same sublayers \(`blocks.0.mixer`\)"
    ):
        fused(EXPERTS[0], both)
    with pytest.raises(ConfigError, match="expert 1 has a LoRALinear"):
        fused(*[TinyExpert(transforms=(LoRA(rank=2),))] * 2)
    with pytest.raises(ConfigError, match="model 2 was trained on another base"):
        fused(EXPERTS[0], EXPERTS[1].replace(base_seed=3))
