"""DPO and its relatives against TRL's own loss functions, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from pair_rows import (
    PAIRS,
    answer_logprobs,
    moved,
    outputs_of,
    padded_logprobs,
    padded_mask,
    pair_batch,
)
from tiny_generation import tiny_model

from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.objectives.dpo import (
    DPO,
    AgainstComplement,
    Hinge,
    Logistic,
    MeanOfTokens,
    RobustLogistic,
    cpo,
    ipo,
    orpo,
    simpo,
)

Oracle = Callable[[DecoderModel], torch.Tensor]


def trl_dpo(kind: str, *, beta: float, smoothing: float = 0.0) -> Oracle:
    """TRL's trainer method on a stand-in trainer; its model gives our separate rows' numbers."""

    def loss(model: DecoderModel) -> torch.Tensor:
        trl = pytest.importorskip("trl.trainer.dpo_trainer")
        trainer = MagicMock()
        trainer.aux_loss_enabled = trainer.use_weighting = False
        trainer.ld_alpha, trainer.precompute_ref_logps = None, True
        trainer.f_divergence_type, trainer.loss_types, trainer.loss_weights = (
            "reverse_kl",
            [kind],
            [1.0],
        )
        trainer.beta, trainer.label_smoothing = beta, smoothing
        trainer.accelerator.device = "cpu"
        trainer.accelerator.gather_for_metrics = lambda x: x
        with torch.no_grad():
            reference = padded_logprobs(tiny_model()).sum(-1)
        mask = padded_mask()
        chosen, rejected = reference.chunk(2)
        inputs = {
            "input_ids": torch.zeros_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        outputs = outputs_of(padded_logprobs(model))
        result: torch.Tensor = trl.DPOTrainer._compute_loss(
            trainer, lambda **_: outputs, inputs, False
        )
        return result

    return loss


def trl_cpo(kind: str, *, beta: float, averaged: bool, smoothing: float = 0.0, **more) -> Oracle:
    def loss(model: DecoderModel) -> torch.Tensor:
        trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
        trainer = SimpleNamespace(
            alpha=0.0,
            loss_type=kind,
            beta=beta,
            label_smoothing=smoothing,
            simpo_gamma=more.get("gamma"),
            accelerator=SimpleNamespace(device="cpu"),
        )
        rows = padded_logprobs(model)
        if more.get("referenced"):
            rows = rows - padded_logprobs(tiny_model()).detach()
        lengths = padded_mask().sum(-1) if averaged else 1
        chosen, rejected = (rows.sum(-1) / lengths).chunk(2)
        losses: torch.Tensor = trl.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
        return losses.mean() + more.get("anchor", 0.0) * chosen_nll(model)

    return loss


def trl_orpo(weight: float) -> Oracle:
    def loss(model: DecoderModel) -> torch.Tensor:
        trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
        trainer = SimpleNamespace(beta=weight, accelerator=SimpleNamespace(device="cpu"))
        chosen, rejected = (padded_logprobs(model).sum(-1) / padded_mask().sum(-1)).chunk(2)
        losses: torch.Tensor = trl.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
        return chosen_nll(model) - losses.mean()

    return loss


def chosen_nll(model: DecoderModel) -> torch.Tensor:
    """Cross-entropy over the tokens of all chosen answers."""
    return -torch.cat([answer_logprobs(model, p, a) for p, a, _ in PAIRS]).mean()


CASES = {
    "dpo": (DPO(beta=0.3), trl_dpo("sigmoid", beta=0.3)),
    "cdpo": (
        DPO(beta=0.3, link=Logistic(label_smoothing=0.1)),
        trl_cpo("sigmoid", beta=0.3, averaged=False, smoothing=0.1, referenced=True),
    ),
    "robust": (
        DPO(beta=0.3, link=RobustLogistic(flipped=0.2)),
        trl_dpo("robust", beta=0.3, smoothing=0.2),
    ),
    "ipo": (ipo(0.3), trl_dpo("ipo", beta=0.3)),
    "slic": (DPO(beta=0.3, link=Hinge()), trl_dpo("hinge", beta=0.3)),
    "averaged": (DPO(beta=2.0, normalise=MeanOfTokens()), trl_dpo("sigmoid_norm", beta=2.0)),
    "simpo": (simpo(2.0, 0.8), trl_cpo("simpo", beta=2.0, averaged=True, gamma=0.8)),
    "cpo": (cpo(0.3), trl_cpo("sigmoid", beta=0.3, averaged=False, anchor=1.0)),
    "orpo": (orpo(0.2), trl_orpo(0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_match_trl(name: str) -> None:
    """Ours on trees that share the prompt, TRL's on separate rows."""
    objective, oracle = CASES[name]
    ours, theirs = moved(), moved()
    output = objective(ours, pair_batch())
    loss = output.total / output.weight
    loss.backward()
    expected = oracle(theirs)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=n)


def test_measures_of_pairs() -> None:
    """Implicit rewards beta log pi / ref, and how often the chosen answer's is the higher."""
    metrics = DPO(beta=0.3)(moved(), pair_batch()).metrics
    with torch.no_grad():
        gaps = padded_logprobs(moved()).sum(-1) - padded_logprobs(tiny_model()).sum(-1)
    chosen, rejected = (0.3 * gaps).chunk(2)
    expected = {
        "accuracy": float(sum(c > r for c, r in zip(chosen, rejected, strict=True))),
        "margin": float((chosen - rejected).sum()),
        "chosen": float(chosen.sum()),
        "rejected": float(rejected.sum()),
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert 0 < expected["accuracy"] < len(PAIRS)
    assert not any(m.requires_grad for m in metrics.values())


def test_robust_loss_is_unbiased_under_flips() -> None:
    """Its expectation over labels flipped at the rate eps is the clean loss."""
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    eps = 0.3
    link = RobustLogistic(flipped=eps)
    expected = (1 - eps) * link(z, 1.0) + eps * link(-z, 1.0)
    torch.testing.assert_close(expected, Logistic()(z, 1.0))


def test_confidence_of_smoothing_is_label_smoothing() -> None:
    batch = pair_batch()
    eps = 0.2
    sure = extended_with(batch, 1.0)
    torch.testing.assert_close(DPO()(moved(), sure).total, DPO()(moved(), batch).total)
    smoothed = DPO(link=Logistic(label_smoothing=eps))(moved(), batch).total
    torch.testing.assert_close(DPO()(moved(), extended_with(batch, 1 - eps)).total, smoothed)


def test_a_doubtful_pair_is_asked_for_its_target_both_ways() -> None:
    margin = torch.linspace(-2, 2, 9, dtype=torch.float64)
    confidence = torch.linspace(0, 1, 9, dtype=torch.float64)
    loss = DPO(target=0.7).preference(margin, confidence)
    right, wrong = (1 / (1 + (0.7 - m).exp()) for m in (margin, -margin))
    exact = -(confidence * right.log() + (1 - confidence) * wrong.log())
    torch.testing.assert_close(loss, exact)


def extended_with(batch, confidence: float):
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return type(batch)(**fields | {"confidence": torch.full((len(PAIRS),), confidence)})


def test_complement_of_a_certain_answer_is_finite() -> None:
    logp = torch.tensor([0.0, -1e-9, -40.0], requires_grad=True)
    odds = AgainstComplement()(logp, None)
    odds.sum().backward()
    assert odds.isfinite().all()
    some = torch.tensor([-1e-5, -0.02, -0.3, -1.0, -20.0])
    exact = some.double() - (-some.double().exp()).log1p()
    torch.testing.assert_close(AgainstComplement()(some, None).double(), exact, rtol=1e-5, atol=0)
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_a_missing_reference_is_named() -> None:
    batch = pair_batch(reference=False)
    assert simpo()(tiny_model(), batch).total.isfinite()
    with pytest.raises(TreadleError, match="the source computes none"):
        DPO()(tiny_model(), batch)
