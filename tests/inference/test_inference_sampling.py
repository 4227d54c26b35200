"""Sampling: truncation against transformers' processors, draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from treadle.inference import sampling
from treadle.inference.sampling import Sampling, sample, truncate, typical, uniform

VOCAB = 400


def logits(rows: int = 6, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))


def ours(x: torch.Tensor, *, top_k=None, top_p=1.0, min_p=0.0) -> torch.Tensor:
    rows = len(x)
    return truncate(
        x,
        torch.full((rows,), top_k or VOCAB),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )


@pytest.mark.parametrize("candidates", [8, 256])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"top_k": 7}, ["TopKLogitsWarper"]),
        ({"top_k": 1}, ["TopKLogitsWarper"]),
        ({"top_p": 0.8}, ["TopPLogitsWarper"]),
        ({"top_p": 0.999}, ["TopPLogitsWarper"]),
        ({"top_p": 0.01}, ["TopPLogitsWarper"]),
        ({"min_p": 0.05}, ["MinPLogitsWarper"]),
        ({"top_k": 30, "top_p": 0.7}, ["TopKLogitsWarper", "TopPLogitsWarper"]),
    ],
)
def test_truncation_matches_transformers(
    settings, names, candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    x = logits()
    expected = x
    for name, value in zip(names, settings.values(), strict=True):
        expected = getattr(process, name)(value)(None, expected)
    torch.testing.assert_close(ours(x, **settings), expected)


def test_rows_keep_their_own_settings() -> None:
    x = logits(3)
    mixed = truncate(
        x,
        torch.tensor([5, VOCAB, VOCAB]),
        torch.tensor([1.0, 0.6, 1.0]),
        torch.tensor([0.0, 0.0, 0.0]),
    )
    torch.testing.assert_close(mixed[:1], ours(x[:1], top_k=5))
    torch.testing.assert_close(mixed[1:2], ours(x[1:2], top_p=0.6))
    torch.testing.assert_close(mixed[2:], x[2:])


@pytest.mark.parametrize("mass", [0.2, 0.9, 0.999])
def test_typical_matches_transformers(mass: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    x = logits()
    expected = process.TypicalLogitsWarper(mass)(None, x)
    torch.testing.assert_close(typical(x, torch.full((len(x),), mass)), expected)
    mixed = typical(x[:2], torch.tensor([mass, 1.0]))
    torch.testing.assert_close(mixed, torch.stack([expected[0], x[1]]))


def draws(setting: Sampling, x: torch.Tensor, count: int):
    rows = x.expand(count, -1)
    configs = [setting.replace(seed=i) for i in range(count)]
    return sample(rows, configs, streams=[0] * count, steps=[0] * count)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws, at temperature 0.8 with top-p 0.9."""
    x = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    setting = Sampling(temperature=0.8, top_p=0.9)
    p = truncate(x / 0.8, torch.tensor([40]), torch.tensor([0.9]), torch.tensor([0.0])).softmax(-1)[
        0
    ]
    tokens = draws(setting, x, 20_000).tokens
    counts = torch.bincount(tokens, minlength=40).double()
    kept = p > 0
    assert counts[~kept].sum() == 0
    expected = 20_000 * p[kept].double()
    chi2 = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_logprobs_are_of_the_tempered_model_before_truncation() -> None:
    x = logits(1)
    draw = draws(Sampling(temperature=0.5, top_k=3), x, 50)
    expected = (x / 0.5).log_softmax(-1)[0][draw.tokens]
    torch.testing.assert_close(draw.logprobs, expected)


def test_greedy_rows_in_a_mixed_batch() -> None:
    x = logits(2)
    configs = [Sampling(temperature=0.0), Sampling(temperature=1.0, seed=4)]
    draw = sample(x, configs, streams=[0, 0], steps=[0, 0])
    assert draw.tokens[0] == x[0].argmax()
    torch.testing.assert_close(draw.logprobs[0], x[0].log_softmax(-1).max())


def test_uniform_numbers_are_uniform_and_independent() -> None:
    n = 50_000
    u = uniform([7] * n, [0] * n, range(n))
    v = uniform(range(n), [0] * n, [0] * n)
    for x in (u, v):
        assert x.min() >= 0
        assert x.max() < 1
        assert abs(x.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.02
    assert len(np.unique(u)) == n


@pytest.mark.parametrize(
    "bad",
    [
        {"typical_p": 0.0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": 0},
        {"max_tokens": 0},
        {"topp": 0.5},
    ],
)
def test_absurd_settings_are_refused(bad) -> None:
    with pytest.raises(ValidationError):
        Sampling(**bad)
