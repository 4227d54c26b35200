"""Reward models against TRL's loss, on trees and on separate rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from pair_rows import PAIRS, pair_batch
from tiny_generation import tiny_model

from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.reward_head import RewardHead
from treadle.objectives.dpo import PreferenceBatch
from treadle.objectives.reward import BradleyTerry, sequence_scores

MARGINS = torch.tensor([0.5, 0.0, 1.5])


def reward_model() -> DecoderModel:
    model = RewardHead()(tiny_model())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.linear.weight)
    return model


def row_scores(model: DecoderModel) -> torch.Tensor:
    """The score at the last token of each sequence on its own, all chosen and then all rejected."""
    rows = [p + a for p, a, _ in PAIRS] + [p + a for p, _, a in PAIRS]
    return torch.cat([model.head.linear(model(torch.tensor(row)))[-1] for row in rows])


def trl_loss(model: DecoderModel, centre: float | None, margins: torch.Tensor | None):
    trl = pytest.importorskip("trl.trainer.reward_trainer")
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = centre
    trainer.aux_loss_enabled = False
    trainer.accelerator.gather_for_metrics = lambda x: x
    outputs = SimpleNamespace(logits=row_scores(model)[:, None])
    inputs = {"input_ids": torch.zeros(6, 2), "attention_mask": torch.ones(6, 2)}
    if margins is not None:
        inputs["margin"] = margins
    return trl.RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)


@pytest.mark.parametrize("margins", [None, MARGINS])
@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_loss_and_gradients_match_trl(margins, centre: float) -> None:
    ours, theirs = reward_model(), reward_model()
    batch = replace(pair_batch(), margins=margins)
    output = BradleyTerry(centre=centre)(ours, batch)
    (output.total / output.weight).backward()
    expected = trl_loss(theirs, centre or None, margins)
    expected.backward()
    torch.testing.assert_close(output.total / output.weight, expected, rtol=1e-4, atol=1e-6)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=n)


def test_margins_of_pairs_go_before_the_common_one() -> None:
    model = reward_model()
    same = replace(pair_batch(), margins=torch.full((3,), 0.7))
    common = BradleyTerry(margin=0.7)(model, pair_batch()).total
    torch.testing.assert_close(BradleyTerry(margin=9.0)(model, same).total, common)
    mixed = replace(pair_batch(), margins=torch.tensor([0.7, torch.nan, torch.nan]))
    torch.testing.assert_close(BradleyTerry(margin=0.7)(model, mixed).total, common)


def test_doubtful_labels_count_for_both_orders() -> None:
    """Value and gradient from rows; measures are sums over pairs."""
    ours, theirs = reward_model(), reward_model()
    sure = torch.tensor([1.0, 0.8, 0.6])
    output = BradleyTerry(margin=0.4)(ours, replace(pair_batch(), confidence=sure))
    output.total.backward()
    chosen, rejected = row_scores(theirs).chunk(2)
    right, wrong = (1 / (1 + (0.4 - d).exp()) for d in (chosen - rejected, rejected - chosen))
    expected = -(sure * right.log() + (1 - sure) * wrong.log()).sum()
    expected.backward()
    torch.testing.assert_close(output.total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.head.linear.weight.grad, theirs.head.linear.weight.grad, rtol=1e-3, atol=1e-4
    )
    measures = {
        "accuracy": float((chosen > rejected).sum()),
        "margin": float((chosen - rejected).detach().sum()),
        "score": float((chosen + rejected).detach().sum() / 2),
    }
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(measures, rel=1e-3)
    assert not any(m.requires_grad for m in output.metrics.values())


def test_half_a_confidence_asks_for_equal_scores() -> None:
    """At q = 1/2 and no margin the loss is least, ln 2, where both scores are the same."""
    scores = RewardHead()(tiny_model())
    batch: PreferenceBatch = replace(pair_batch(), confidence=torch.full((3,), 0.5))
    at_zero = BradleyTerry()(scores, batch)
    torch.testing.assert_close(at_zero.total / at_zero.weight, torch.tensor(2.0).log())
    assert BradleyTerry()(reward_model(), batch).total > at_zero.total


def test_fresh_heads_have_no_opinion_and_are_trained() -> None:
    model = tiny_model().requires_grad_(False)
    scored = RewardHead()(model)
    assert sequence_scores(scored, pair_batch()).tolist() == [0.0] * 6
    assert [n for n, p in scored.named_parameters() if p.requires_grad] == ["head.linear.weight"]


def test_language_models_are_refused() -> None:
    with pytest.raises(TreadleError, match="gives words, not scores: add the transform"):
        BradleyTerry()(tiny_model(), pair_batch())
