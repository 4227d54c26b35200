"""LoRA+ beside PEFT's own optimiser, and what else must hold of its groups."""

from __future__ import annotations

import pytest
import torch
from peft_pair import TOKENS, logits, perturbed, tiny, trained, transformers_of

from treadle.core.errors import ConfigError
from treadle.optim.adamw import AdamW
from treadle.optim.lora_plus import LoRAPlus
from treadle.peft.adapter import adapted
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA


def test_matches_peft() -> None:
    """Three steps: the factors move as under PEFT's create_loraplus_optimizer."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = perturbed(LoRA(rank=4, alpha=8, targets=("q", "down"))(tiny()))
    theirs = get_peft_model(
        transformers_of(tiny()),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    )
    pairs = []
    for name, layer in adapted(model).items():
        _, number, room, leaf = name.split(".")
        path = f"{'self_attn' if room == 'mixer' else 'mlp'}.{leaf}_proj"
        front = f"base_model.model.model.layers.{number}.{path}"
        for part, ours in (("A", layer.A), ("B", layer.B)):
            parameter = theirs.get_parameter(f"{front}.lora_{part}.default.weight")
            parameter.data.copy_(ours)
            pairs.append((ours, parameter))
    expected = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    plus = LoRAPlus(optimizer=AdamW(lr=1e-3, weight_decay=0.1), ratio=8.0)
    ours_optimizer = plus.build(list(trained(model).items()))
    for _ in range(3):
        logits(model).square().mean().backward()
        theirs(TOKENS).logits.square().mean().backward()
        for optimizer in (ours_optimizer, expected):
            optimizer.step()
            optimizer.zero_grad()
    for ours, parameter in pairs:
        torch.testing.assert_close(ours, parameter, rtol=1e-3, atol=1e-5)


def test_all_that_trains_is_in_one_group_and_only_b_is_fast() -> None:
    model = LoRA(rank=4, targets=("q", "embedding"))(tiny())
    built = LoRAPlus(optimizer=AdamW(lr=1e-3, weight_decay=0.1), ratio=4.0).build(
        list(trained(model).items())
    )
    rates = {id(p): g["lr"] for g in built.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in built.param_groups) == len(trained(model)) == len(rates)
    for name, parameter in trained(model).items():
        assert rates[id(parameter)] == (4e-3 if name.endswith(".B") else 1e-3)
    assert built.param_groups[0]["lr"] == 1e-3


def test_without_lora_it_says_so() -> None:
    with pytest.raises(ConfigError, match="no factor B trains; add a LoRA"):
        LoRAPlus(optimizer=AdamW(lr=1e-3)).build(list(trained(IA3()(tiny())).items()))
