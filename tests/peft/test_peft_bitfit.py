"""BitFit beside transformers' GPT-2, whose layers have biases."""

from __future__ import annotations

import pytest
import torch
from peft_pair import TOKENS, logits, perturbed, tiny, trained

from treadle.core.errors import ConfigError, TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_for_hf
from treadle.models.gpt2 import gpt2
from treadle.models.hub.fill import applicable, spill
from treadle.nn.linear import bias_of
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.bitfit import BitFit
from treadle.peft.files import save_adapter

TARGETS = ("o", "up", "down")
THEIRS = {"mixer.o": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}


def tiny_gpt2() -> DecoderModel:
    torch.manual_seed(0)
    model = gpt2(vocab=32, dim=16, layers=2, heads=2, context=32).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_gradients_are_those_of_transformers_biases() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = tiny_gpt2()
    family = family_for_hf(plain.config).huggingface
    theirs = GPT2LMHeadModel(GPT2Config(**family.write(plain.config)))
    rules = applicable(plain, family.rules(plain.config))
    theirs.load_state_dict(dict(spill(plain, rules)), strict=False)
    theirs.eval()
    model = BitFit(targets=TARGETS)(plain)
    ours, expected = model.logits(model(TOKENS)), theirs(TOKENS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected.shape)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    layers = adapted(model)
    assert len(layers) == 6
    for name, parameter in trained(model).items():
        _, layer, part = name.removesuffix(".d").split(".", 2)
        their = theirs.get_parameter(f"transformer.h.{layer}.{THEIRS[part]}.bias")
        assert their.grad is not None
        assert their.grad.abs().max() > 1e-3
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, their.grad, rtol=1e-3, atol=1e-3)


def test_models_without_biases_get_them() -> None:
    model = perturbed(BitFit()(tiny()), size=0.5)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
    out = logits(model)
    assert (out - logits(tiny())).abs().max() > 0.1
    first = dict(adapted(model))["blocks.0.mixer.q"]
    x = torch.randn(3, 32)
    d = dict(trained(model))["blocks.0.mixer.q.d"]
    torch.testing.assert_close(first(x), first.base(x) + d)
    torch.testing.assert_close(logits(merge(model)), out, rtol=1e-4, atol=1e-4)


def test_merged_into_a_bias_that_is_there() -> None:
    model = perturbed(BitFit(targets=TARGETS)(tiny_gpt2()), size=0.5)
    layer = adapted(model)["blocks.0.ffn.up"]
    expected = layer.base.bias + dict(trained(model))["blocks.0.ffn.up.d"]
    out = model.logits(model(TOKENS))
    merged = merge(model)
    torch.testing.assert_close(bias_of(merged.get_submodule("blocks.0.ffn.up")), expected)
    torch.testing.assert_close(merged.logits(merged(TOKENS)), out, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="`embedding` is a Embedding; it trains biases"):
        BitFit(targets=("embedding",))(tiny())
    with pytest.raises(TreadleError, match="PEFT has no bias tuning by itself"):
        save_adapter(BitFit()(tiny()), str(tmp_path))
