"""One tiny Llama in treadle and in transformers, and PEFT's parameters beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.families import family_for_hf
from treadle.models.hub.fill import applicable, spill
from treadle.models.llama import tiny_llama
from treadle.peft.files import load_adapter, save_adapter

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def tiny(*, seed: int = 0, dim: int = 32) -> DecoderModel:
    torch.manual_seed(seed)
    config: Decoder = tiny_llama(32, dim=dim, layers=2, heads=4, kv_heads=2, hidden=48)
    model = config.build()
    with torch.no_grad():  # larger than fresh weights, so that every part shows in the logits
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def transformers_of(model: DecoderModel) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    family = family_for_hf(model.config).huggingface
    theirs = LlamaForCausalLM(LlamaConfig(**family.write(model.config)))
    rules = applicable(model, family.rules(model.config))
    theirs.load_state_dict(dict(spill(model, rules)), strict=False)
    return theirs.eval()


def logits(model: DecoderModel) -> Tensor:
    return model.logits(model(TOKENS))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def perturbed(model: DecoderModel, size: float = 0.1) -> DecoderModel:
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=size)
    return model


def check_against_peft(model: DecoderModel, folder: Path) -> int:
    """Our adapter opened by PEFT: the same logits and gradients; and its folder opened by us.

    Returns the number of tensors whose gradients were compared.
    """
    from peft import PeftModel, get_peft_model_state_dict

    save_adapter(model, folder / "ours")
    theirs = PeftModel.from_pretrained(
        transformers_of(tiny()), folder / "ours", is_trainable=True
    ).eval()
    found, expected = logits(model.eval()), theirs(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(tiny())).abs().max() > 0.1
    theirs.save_pretrained(folder / "theirs")
    again = load_adapter(tiny(), folder / "theirs").eval()
    torch.testing.assert_close(logits(again), found, rtol=1e-4, atol=1e-4)

    weight = torch.randn(expected.shape)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for module in (model, theirs):  # gradients in the place of weights: both can name those
        for parameter in trained(module).values():
            assert parameter.grad is not None
            parameter.data = parameter.grad
    save_adapter(model, folder / "gradients")
    ours = load_file(folder / "gradients" / "adapter_model.safetensors")
    gradients = {
        name: tensor
        for name, tensor in get_peft_model_state_dict(theirs).items()
        if "base_layer" not in name
    }
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    return len(gradients)
