"""Soft labels against TRL's GKD loss and naive float64; gradients included; memory bounded."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from train.tiny import VOCAB, documents, tiny_model

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, assemble
from treadle.kernels import linear_cross_entropy as lce
from treadle.models.decoder import DecoderModel, LinearHead
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels, TaughtBatch
from treadle.objectives.divergence import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedKL,
    SkewedReverseKL,
)
from treadle.objectives.soft_labels import Annealed, SoftLabels, Steady


def moved(model: DecoderModel, seed: int = 5) -> DecoderModel:
    """Weights large enough that distributions are far from uniform."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lce, "CHUNK_ELEMENTS", 7 * VOCAB)
    monkeypatch.setattr(lce, "CHUNK_ROWS", 7)


def student() -> DecoderModel:
    return moved(tiny_model())


def teacher() -> DecoderModel:
    return moved(tiny_model(seed=9, layers=3, dim=24), seed=6)


def plain() -> Batch:
    return assemble(documents(0, 5))


def given(batch: Batch, **extra) -> TaughtBatch:
    return TaughtBatch(**{f.name: getattr(batch, f.name) for f in fields(Batch)}, **extra)


@torch.no_grad()
def taught_batch() -> TaughtBatch:
    batch, model = plain(), teacher()
    hidden = model(batch.tokens, batch.context())[batch.sources]
    return given(batch, teacher_hidden=hidden, teacher_head=model.head_weight())


def logits(model: DecoderModel) -> torch.Tensor:
    batch = plain()
    return model.logits(model(batch.tokens, batch.context())[batch.sources])


def compare(ours: DecoderModel, loss, theirs: DecoderModel, expected) -> None:
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.to(p.dtype), rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        (ForwardKL(), 0.0),
        (ReverseKL(), 1.0),
        (JensenShannon(beta=0.3), 0.3),
        (JensenShannon(), 0.5),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_labels_match_trl(divergence: Divergence, beta: float, temperature: float) -> None:
    """TRL leaves out Hinton's T^2; all else is equal, gradients too."""
    trl = pytest.importorskip("trl.experimental.gkd")
    ours, theirs = student(), student()
    term = SoftLabels(divergence=divergence, temperature=Steady(value=temperature))
    output = Distil(terms=(term,))(ours, taught_batch())
    expected = trl.GKDTrainer.generalized_jsd_loss(
        logits(theirs), logits(teacher()).detach(), beta=beta, temperature=temperature
    )
    compare(ours, output.total / output.weight, theirs, expected * temperature**2)


def formula(divergence: Divergence, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    match divergence:
        case ForwardKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JensenShannon(beta=b):
            m = b * p + (1 - b) * q
            return b * kl(p, m) + (1 - b) * kl(q, m)
        case SkewedKL(alpha=a):
            return kl(p, a * p + (1 - a) * q)
        case SkewedReverseKL(alpha=a):
            return kl(q, a * q + (1 - a) * p)
    raise AssertionError


ALL = (ForwardKL(), ReverseKL(), JensenShannon(beta=0.2), SkewedKL(), SkewedReverseKL(alpha=0.3))


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("k", [None, 5])
def test_divergences_match_float64(divergence: Divergence, k: int | None) -> None:
    """Whole distributions, and the k likeliest tokens with all others as one class."""
    ours, theirs, batch = student(), student().double(), taught_batch()
    p = logits(teacher()).double().softmax(-1).detach()
    q = logits(theirs).softmax(-1)
    if k is not None:
        top = p.topk(k, -1)
        batch = given(plain(), top_tokens=top.indices.int(), top_logprobs=top.values.log().float())
        p = torch.cat([top.values, 1 - top.values.sum(-1, keepdim=True)], -1)
        named = q.gather(-1, top.indices)
        q = torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)
    weights = torch.rand(len(batch.weights))
    batch = TaughtBatch(
        **{**{f.name: getattr(batch, f.name) for f in fields(batch)}, "weights": weights}
    )
    output = Distil(terms=(SoftLabels(divergence=divergence),))(ours, batch)
    expected = (weights * formula(divergence, p, q)).sum() / weights.sum()
    compare(ours, output.total / output.weight, theirs, expected)


@pytest.mark.parametrize("k", [None, 5])
def test_caps_biases_and_temperature_of_both(k: int | None) -> None:
    """Student and teacher with heads of their own, biases and capped logits."""

    def capped(model: DecoderModel, cap: float, seed: int) -> DecoderModel:
        return moved(model.config.replace(head=LinearHead(bias=True), softcap=cap).build(), seed)

    ours, theirs = (capped(tiny_model(), 4.0, 5) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    theirs.double()
    wise, batch = capped(teacher(), 2.5, 6).requires_grad_(False), plain()
    p = (logits(wise).double() / 3).softmax(-1)
    q = (logits(theirs) / 3).softmax(-1)
    if k is None:
        batch = given(
            batch,
            teacher_hidden=wise(batch.tokens, batch.context())[batch.sources],
            teacher_head=wise.head.weight,
            teacher_bias=wise.head.bias,
            teacher_softcap=2.5,
        )
    else:
        top = p.topk(k, -1)
        logprobs = top.values.log().float()
        batch = given(
            batch, top_tokens=top.indices.int(), top_logprobs=logprobs, top_temperature=3.0
        )
        p = torch.cat([top.values, 1 - top.values.sum(-1, keepdim=True)], -1)
        named = q.gather(-1, top.indices)
        q = torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)
    output = Distil(terms=(SoftLabels(temperature=Steady(value=3.0)),))(ours, batch)
    expected = 9 * formula(ForwardKL(), p, q).mean()
    assert expected > 0.1
    compare(ours, output.total / output.weight, theirs, expected)


def test_a_teacher_that_is_sure_leaves_no_rest() -> None:
    """What it names sums to more than 1 when it was rounded: no logarithm of less than nothing."""
    ours, theirs, batch = student(), student().double(), plain()
    tokens = torch.stack([batch.targets, (batch.targets + 1) % VOCAB], -1)
    logprobs = torch.tensor([0.0, -9.0]).repeat(len(tokens), 1)
    batch = given(batch, top_tokens=tokens.int(), top_logprobs=logprobs)
    output = Distil(terms=(SoftLabels(),))(ours, batch)
    log_q = logits(theirs).log_softmax(-1).gather(-1, tokens)
    p = logprobs.double().exp()
    expected = (p * (p.log() - log_q)).sum() / len(tokens)
    compare(ours, output.total / output.weight, theirs, expected)


def test_mixture_is_the_sum_of_its_terms() -> None:
    ours, theirs, batch = student(), student(), taught_batch()
    output = Distil(terms=(HardLabels(weight=0.3), SoftLabels(weight=0.7)))(ours, batch)
    hard, soft = CausalLM()(theirs, batch), Distil(terms=(SoftLabels(),))(theirs, batch)
    expected = 0.3 * hard.total / hard.weight + 0.7 * soft.total / soft.weight
    compare(ours, output.total / output.weight, theirs, expected)
    assert set(output.metrics) == {"hard_labels", "soft_labels"}
    assert not any(value.requires_grad for value in output.metrics.values())
    several = Distil(terms=(SoftLabels(), HardLabels(), SoftLabels(divergence=ReverseKL())))
    assert set(several(ours, batch).metrics) == {"soft_labels_0", "hard_labels", "soft_labels_2"}


def test_student_that_is_its_teacher_has_no_loss() -> None:
    batch, model = plain(), student()
    hidden = model(batch.tokens, batch.context())[batch.sources].detach()
    batch = given(batch, teacher_hidden=hidden, teacher_head=model.head_weight().detach())
    for divergence in ALL:
        model.zero_grad()
        output = Distil(terms=(SoftLabels(divergence=divergence),))(model, batch)
        output.total.backward()
        assert abs(output.total.item()) < 1e-4
        assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4


def test_annealed_temperature_follows_the_step() -> None:
    annealed = Annealed(start=4.0, end=1.0, steps=10)
    assert [annealed(s) for s in (0, 5, 10, 99)] == [4.0, 2.5, 1.0, 1.0]
    batch = taught_batch()
    late = TaughtBatch(**{**{f.name: getattr(batch, f.name) for f in fields(batch)}, "step": 5})
    moving = Distil(terms=(SoftLabels(temperature=annealed),))(student(), late)
    steady = Distil(terms=(SoftLabels(temperature=Steady(value=2.5)),))(student(), batch)
    assert float(moving.total) == float(steady.total)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_never_holds_all_logits() -> None:
    batch, model = taught_batch(), student()
    assert len(batch.targets) >= 4 * 7
    largest = max(7 * VOCAB, model.embedding.weight.numel(), teacher().embedding.weight.numel())
    with Largest() as seen:
        Distil(terms=(SoftLabels(),))(model, batch).total.backward()
    assert seen.elements <= max(largest, batch.layout.tokens * 32)
    with Largest() as naive:
        F.kl_div(logits(student()), logits(teacher()), reduction="sum")
    assert naive.elements >= len(batch.targets) * VOCAB > seen.elements


def test_what_the_teacher_did_not_give_is_named() -> None:
    with pytest.raises(TreadleError, match=r"SoftLabels: the teacher did not give.*Live\(\)"):
        Distil(terms=(SoftLabels(),))(student(), given(plain()))
    top = given(
        plain(), top_tokens=torch.zeros(1, 1), top_logprobs=torch.zeros(1, 1), top_temperature=2.0
    )
    with pytest.raises(TreadleError, match=r"kept at temperature 2.0, but SoftLabels asks for 1.0"):
        Distil(terms=(SoftLabels(),))(student(), top)
