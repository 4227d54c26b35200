"""AdaLoRA beside PEFT: layers, penalty and the allocation of ranks, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pair import TOKENS, check_against_peft, logits, perturbed, tiny, trained, transformers_of
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.data.batch import Piece, assemble
from treadle.models.decoder import DecoderModel
from treadle.objectives.causal import CausalLM
from treadle.objectives.orthogonal import Orthogonal, distance
from treadle.optim.adamw import AdamW
from treadle.optim.allocate_ranks import AllocateRanks, find_triplets
from treadle.peft.adalora import AdaLoRA
from treadle.peft.adapter import adapted, merge
from treadle.peft.lora import LoRA

TARGETS = ("q", "v", "down")


def batch() -> Any:
    row = TOKENS[0].tolist()
    return assemble([Piece(row, [True] * len(row))])


def theirs_of(model: DecoderModel, **schedule: Any) -> Any:
    """PEFT's model with the factors of ours."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=6, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], **schedule
    )
    theirs = get_peft_model(transformers_of(tiny()), config)
    with torch.no_grad():
        for name, ours in pairs(theirs, model):
            theirs.get_parameter(name).copy_(ours)
    return theirs


def pairs(theirs: Any, model: DecoderModel) -> list[tuple[str, Tensor]]:
    """Names of PEFT's factors, and ours in the same order and shape."""
    names = [n for n, p in theirs.named_parameters() if p.requires_grad]
    found = []
    for name in names:
        parts = name.split(".")
        layer, leaf = parts[parts.index("layers") + 1], parts[-3].removesuffix("_proj")
        room = "ffn" if leaf == "down" else "mixer"
        tensors = model.get_submodule(f"blocks.{layer}.{room}.{leaf}").peft_tensors()
        found.append((name, tensors[parts[-2]]))
    return found


def test_matches_peft(tmp_path: Path) -> None:
    model = perturbed(AdaLoRA(rank=4, alpha=12, targets=TARGETS)(tiny()), size=0.3)
    assert check_against_peft(model, tmp_path) == 18


def test_start_equals_base_and_merged_equals_adapted() -> None:
    model = AdaLoRA(rank=4)(tiny())
    assert torch.equal(logits(model), logits(tiny()))
    for name, factor in trained(model).items():
        assert name.endswith(".e") or 0.01 < factor.std().item() < 0.03
    perturbed(model, size=0.3)
    before = logits(model)
    torch.testing.assert_close(logits(merge(model)), before, rtol=1e-4, atol=1e-4)


def test_penalty_matches_peft() -> None:
    """The loss with the penalty, and its gradients."""
    model = perturbed(AdaLoRA(rank=6, alpha=12, targets=TARGETS)(tiny()))
    theirs = theirs_of(model, total_step=10, orth_reg_weight=0.3)
    row = TOKENS[:1]
    expected = theirs.base_model(row, labels=row).loss
    output = Orthogonal(objective=CausalLM(), weight=0.3)(model, batch())
    loss = output.total / output.weight
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert output.metrics["orthogonality"] / output.weight == pytest.approx(distance(model).item())
    loss.backward()
    expected.backward()
    for name, parameter in trained(model).items():
        parameter.data = parameter.grad  # so that `pairs` shows gradients
        assert parameter.data.abs().max() > 0, name
    for name, gradient in pairs(theirs, model):
        torch.testing.assert_close(gradient, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-4)


def test_allocation_matches_peft() -> None:
    """Eight steps of SGD: the same singular values are switched off, at the same steps."""
    model = perturbed(AdaLoRA(rank=6, alpha=12, targets=TARGETS)(tiny()), size=0.3)
    theirs = theirs_of(
        model, total_step=10, tinit=1, tfinal=3, deltaT=2, target_r=2, orth_reg_weight=0.0
    )
    theirs_sgd = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    allocate = AllocateRanks(optimizer=AdamW(lr=0.05), rank=2, begin=1, end=7, every=2)
    ours_sgd = with_sgd(allocate, model)
    by_place = {p.data_ptr(): p for p in trained(model).values()}
    counts = []
    for step in range(1, 11):
        row = TOKENS[step % 2][None]
        theirs(row, labels=row).loss.backward()
        theirs_sgd.step()
        with torch.no_grad():
            theirs.base_model.update_and_allocate(step)
        theirs_sgd.zero_grad()
        piece = Piece(row[0].tolist(), [True] * 8)
        output = CausalLM()(model, assemble([piece]))
        (output.total / output.weight).backward()
        ours_sgd.step()
        ours_sgd.zero_grad()
        for name, ours in pairs(theirs, model):
            expected = theirs.get_parameter(name)
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
            assert torch.equal(ours == 0, expected == 0)
        seen = theirs.base_model.rankallocator.exp_avg_ipt
        if step < 7:
            remembered = {name: tensor.clone() for name, tensor in seen.items()}
        for name, ours in pairs(theirs, model):  # nothing is learned about them from step 7 on
            state = ours_sgd.state[by_place[ours.data_ptr()]]
            expected = remembered[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(
                state["importance"].view_as(ours), expected, rtol=1e-3, atol=1e-5
            )
        counts.append(sum(int((m.e != 0).sum()) for m in adapted(model).values()))
    assert counts[0] == 36
    assert counts[-1] == 12
    assert counts[1::2] == sorted(counts[1::2], reverse=True)
    assert counts[2:6:2] == [36, 36]  # between cuts, what was switched off may come back
    assert counts[6:] == [12, 12, 12, 12]


def with_sgd(allocate: AllocateRanks, model: DecoderModel) -> torch.optim.Optimizer:
    """The allocation around plain gradient descent, which both sides compute alike."""

    class SGD(AdamW):
        def build(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for _, p in parameters], lr=self.lr)

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return allocate.replace(optimizer=SGD(lr=0.05)).build(named)


def test_budget_is_the_cubic_of_the_paper() -> None:
    allocate = AllocateRanks(optimizer=AdamW(lr=1.0), begin=10, end=110)
    assert [allocate.budget(s, 1000, 200) for s in (1, 10, 60, 110, 500)] == [
        1000,
        1000,
        200 + 800 // 8,
        200,
        200,
    ]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"AdaLoRA: rank 20 is larger than"):
        AdaLoRA(rank=20)(tiny())
    with pytest.raises(ConfigError, match=r"`embedding` is a Embedding"):
        AdaLoRA(rank=2, targets=("embedding",))(tiny())
    with pytest.raises(ValueError, match=r"begin=5 must come before end=5"):
        AllocateRanks(optimizer=AdamW(lr=1.0), begin=5, end=5)
    lora = LoRA(rank=2)(tiny())
    named = list(trained(lora).items())
    assert find_triplets(named) == []
    with pytest.raises(ConfigError, match="no AdaLoRA layer trains"):
        AllocateRanks(optimizer=AdamW(lr=1.0), end=5).build(named)
    AllocateRanks(optimizer=AdamW(lr=1.0), rank=4, end=5).build(
        list(trained(AdaLoRA(rank=4)(tiny())).items())
    )
    with pytest.raises(ConfigError, match="layers start with 4; raise AdaLoRA's rank"):
        AllocateRanks(optimizer=AdamW(lr=1.0), end=5).build(
            list(trained(AdaLoRA(rank=4)(tiny())).items())
        )
    with pytest.raises(ConfigError, match="no AdaLoRA layer"):
        Orthogonal(objective=CausalLM())(lora, batch())
