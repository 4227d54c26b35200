"""Chosen layers: what trains, and that all else stays bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft_pair import logits, tiny, trained

from treadle.core.errors import ConfigError
from treadle.peft.chosen import ChosenLayers


def test_all_else_is_bit_identical() -> None:
    plain = tiny()
    model = ChosenLayers(layers=("blocks.1.ffn", "norm"))(tiny())
    chosen = {f"blocks.1.ffn.{leaf}.weight" for leaf in ("gate", "up", "down")} | {"norm.weight"}
    assert set(trained(model)) == chosen
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        logits(model).square().mean().backward()
        optimizer.step()
    for name, after in model.named_parameters():
        assert torch.equal(after, plain.get_parameter(name)) == (name not in chosen), name
        assert (after.grad is not None) == (name in chosen)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target `blocks.7` matches no layer"):
        ChosenLayers(layers=("norm", "blocks.7"))(tiny())
