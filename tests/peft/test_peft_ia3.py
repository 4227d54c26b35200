"""(IA)^3 beside PEFT: outputs, gradients, files both ways; merged equals adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.ia3 import IA3

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def tiny() -> DecoderModel:
    torch.manual_seed(0)
    decoder = tiny_llama(32, dim=32, layers=2, heads=4, kv_heads=2, hidden=48)
    return decoder.replace(std=0.2).build()


def logits(model: DecoderModel) -> torch.Tensor:
    return model.logits(model(TOKENS))


def perturbed() -> DecoderModel:
    model = IA3()(tiny())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_matches_peft(tmp_path: Path) -> None:
    """A folder that treadle wrote gives the same logits and gradients in PEFT, and comes back."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_hf(tiny(), tmp_path / "base")
    model = perturbed()
    save_adapter(model, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True)
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(expected.shape)
    (logits(model) * weight).sum().backward()
    (expected * weight).sum().backward()
    found = {n: p.grad.flatten() for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: layer.factor.grad for name, layer in adapted(model).items()}
    assert len(found) == len(ours) == 6
    for name, grad in ours.items():
        leaf = {"k": "self_attn.k_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
        _, layer, _, part = name.split(".")
        (match,) = (g for n, g in found.items() if f"layers.{layer}.{leaf[part]}." in n)
        torch.testing.assert_close(grad, match, rtol=1e-3, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(load_model(tmp_path / "base").model, tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(model))


def test_identities() -> None:
    base = logits(tiny())
    torch.testing.assert_close(logits(IA3()(tiny())), base)
    model = perturbed()
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, base)
    with disabled(model):
        torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(logits(merge(model)), with_adapter, rtol=1e-4, atol=1e-5)


def test_bad_targets() -> None:
    with pytest.raises(ConfigError, match=r"IA3: target `key` matches no layer"):
        IA3(targets=("key",))(tiny())
    with pytest.raises(ConfigError, match="scales linear layers"):
        IA3(targets=("embedding",))(tiny())
