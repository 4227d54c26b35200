"""KTO against TRL's own loss function, values and gradients."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from pair_rows import moved, outputs_of, padded_logprobs, padded_mask, pair_batch
from tiny_generation import tiny_model

from treadle.alignment.trees import extended
from treadle.models.decoder import DecoderModel
from treadle.objectives.kto import KTO, LabelledBatch

GOOD = [True, False, True]


def trl_loss(model: DecoderModel, kto: KTO) -> torch.Tensor:
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    trainer = MagicMock()
    trainer.aux_loss_enabled, trainer.precompute_ref_logps, trainer.calculate_KL = False, True, True
    trainer.loss_type, trainer.beta = "kto", kto.beta
    trainer.desirable_weight, trainer.undesirable_weight = kto.good_weight, kto.bad_weight
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = lambda x: x
    own, others = padded_logprobs(model).chunk(2)
    trainer._compute_kl_logps.return_value = others.detach().sum(-1)
    with torch.no_grad():
        ref_own, ref_others = padded_logprobs(tiny_model()).sum(-1).chunk(2)
    mask = padded_mask().chunk(2)[0]
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(GOOD),
        "ref_logps": ref_own,
        "ref_KL_logps": ref_others,
    }
    loss: torch.Tensor = trl.KTOTrainer._compute_loss(
        trainer, lambda **_: outputs_of(own), batch, False
    )
    return loss


def labelled() -> LabelledBatch:
    """The rejected answers stand for those to other prompts."""
    batch = pair_batch()
    return extended(LabelledBatch, batch, reference=batch.reference, good=torch.tensor(GOOD))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_loss_and_gradients_match_trl(seed: int) -> None:
    kto = KTO(beta=0.4, good_weight=1.5, bad_weight=0.7)
    ours, theirs = moved(seed), moved(seed)
    output = kto(ours, labelled())
    (output.total / output.weight).backward()
    expected = trl_loss(theirs, kto)
    expected.backward()
    torch.testing.assert_close(output.total / output.weight, expected, rtol=1e-4, atol=1e-6)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=n)


def test_the_distance_from_the_reference_is_met_above_and_at_zero() -> None:
    """Some seeds go beyond z0 = 0 and some are clamped, so the comparison sees both; rewards are
    beta log pi / ref, summed over good and bad answers."""
    metrics = KTO(beta=0.4)(moved(), labelled()).metrics
    with torch.no_grad():
        gaps = padded_logprobs(moved()).sum(-1) - padded_logprobs(tiny_model()).sum(-1)
    first, second, third = (0.4 * float(gap) for gap in gaps[:3])
    assert float(metrics["reward_good"]) == pytest.approx(first + third, rel=1e-4)
    assert float(metrics["reward_bad"]) == pytest.approx(second, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(max(0.0, float(gaps[3:].sum())), rel=1e-4)
    assert not any(m.requires_grad for m in metrics.values())
    distances = [float(KTO()(moved(seed), labelled()).metrics["kl"]) for seed in (3, 4, 5)]
    assert min(distances) == 0.0 < max(distances)
