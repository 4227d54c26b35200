"""Every family against transformers: the same weights give the same logits and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.hf_zoo import ZOO, save
from torch.testing import assert_close

from treadle.models.families import FAMILIES
from treadle.models.hub.fill import applicable
from treadle.models.hub.load import load_model


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_gradients_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path).double()
    model = load_model(tmp_path, dtype=torch.float64).model
    tokens = torch.randint(0, 61, (2, 23))
    expected = theirs(tokens).logits
    logits = model.logits(model(tokens))
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    ours = {n: p.grad for n, p in model.named_parameters()}
    family = next(f for f in FAMILIES if f.huggingface.model_type == theirs.config.model_type)
    for rule in applicable(model, family.huggingface.rules(model.config)):
        mapped = rule.map.write(tuple(ours.pop(n) for n in rule.ours))
        for their_name, gradient in zip(rule.theirs, mapped, strict=True):
            assert_close(
                gradient,
                gradients.pop(their_name),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=their_name: f"{n}: {m}",
            )
    assert not ours
    assert not gradients
