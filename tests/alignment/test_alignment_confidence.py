"""Confidence in labels: planted flips are found, and the formulas hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pair_rows import pair_trees
from scipy.optimize import minimize
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.confidence import (
    CrossFitted,
    Stated,
    calibrated,
    differences,
    fit_logistic,
    held_out_margins,
    posterior,
)
from treadle.core.errors import TreadleError
from treadle.data.records import Preference, assistant, user
from treadle.data.source import Env
from treadle.models.transform import transformed
from treadle.peft.lora import LoRA


def planted(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of pairs whose better answer a hidden direction decides, and which are flipped."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(8, generator=g, dtype=torch.float64)
    x = torch.randn(1500, 8, generator=g, dtype=torch.float64)
    better = torch.rand(1500, generator=g, dtype=torch.float64) < torch.sigmoid(4 * x @ w)
    flipped = torch.rand(1500, generator=g) < noise
    sign = torch.where(better ^ flipped, 1.0, -1.0)
    return x * sign[:, None], flipped


def confidence(x: torch.Tensor, noise: float) -> torch.Tensor:
    return posterior(calibrated(held_out_margins(x, 5, 1.0), noise), noise)


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_planted_flips_are_found(noise: float) -> None:
    """Flipped pairs get less confidence, and what is said to be right so often is so often."""
    x, flipped = planted(noise)
    q = confidence(x, noise)
    assert q[~flipped].mean() - q[flipped].mean() > 0.3
    for low in np.arange(0, 1, 0.25):
        inside = (q >= low) & (q <= low + 0.25)
        if inside.sum() > 60:
            right = (~flipped[inside]).double().mean()
            assert abs(float(right - q[inside].mean())) < 0.12


def test_the_fit_is_the_minimum() -> None:
    """Newton in the span of the rows against scipy, with more features than pairs and fewer."""
    for shape in ((20, 40), (60, 5)):
        x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rows = x.numpy()

        def loss(w: np.ndarray, rows: np.ndarray = rows) -> float:
            return float(np.logaddexp(0, -rows @ w).sum() + 0.7 * w @ w / 2)

        best = minimize(loss, np.zeros(shape[1]), tol=1e-12)
        np.testing.assert_allclose(fit_logistic(x, 0.7).numpy(), best.x, atol=2e-4)
        few = fit_logistic(x, 0.7, steps=8)  # as fast as Newton's method is
        torch.testing.assert_close(few, fit_logistic(x, 0.7), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_fit_does_not_go_to_and_fro(scale: float) -> None:
    """Nearly separable labels, with hardly a penalty: the gradient vanishes all the same."""
    g = torch.Generator().manual_seed(6)
    x = scale * torch.randn(100, 60, generator=g, dtype=torch.float64)
    w = fit_logistic(x, 0.01)
    gradient = 0.01 * w - x.T @ torch.sigmoid(-(x @ w))
    assert float(gradient.abs().max()) < 1e-6


def test_features_know_no_dropout(tmp_path: Path) -> None:
    model = transformed(tiny_model(), (LoRA(rank=2, dropout=0.5),))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.fill_(0.1)
    here = Env(model=model.train(), tokenizer=byte_tokenizer(), scratch=tmp_path)
    found = differences(here, pair_trees(), 50)
    assert model.training
    model.eval()
    torch.testing.assert_close(found, differences(here, pair_trees(), 50))


def test_margins_do_not_depend_on_units() -> None:
    """Each is that of a fit without the pair's fold, to features in units of their own spread."""
    x, _ = planted(0.1)
    x = x[:40]
    found = held_out_margins(x, 4, 1.0)
    units = torch.tensor([1e-2, 0.3, 1.0, 7.0, 1.0, 1e3, 2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(held_out_margins(x * units, 4, 1.0), found)
    z = x / (x.square().sum(0) / 40).sqrt()
    others = torch.tensor([i for i in range(40) if i % 4 != 2])
    torch.testing.assert_close(found[6], z[6] @ fit_logistic(z[others], 1.0))


def test_posterior_closed_forms() -> None:
    margins = torch.tensor([0.0, 50.0, -50.0, float(np.log(3))], dtype=torch.float64)
    q = posterior(margins, 0.2)
    assert q.tolist() == pytest.approx([0.8, 1.0, 0.0, 0.6 / (0.6 + 0.05)])


def test_features_are_of_the_last_tokens() -> None:
    model = tiny_model()
    env = Env(model=model, tokenizer=byte_tokenizer(), scratch=None)  # type: ignore[arg-type]
    trees = pair_trees()
    found = differences(env, trees, 20)
    for row, (prompt, chosen, rejected) in zip(found, trees, strict=True):
        ends = [model(torch.tensor([*prompt.tokens, *a.tokens]))[-1] for a in (chosen, rejected)]
        torch.testing.assert_close(row.float(), ends[0] - ends[1], rtol=1e-3, atol=1e-4)


def pair(confidence: float | None) -> Preference:
    return Preference((user("x"),), (assistant("y"),), (assistant("z"),), confidence=confidence)


def test_stated_confidence() -> None:
    env, tree = None, None
    assert Stated()(env, [pair(None)] * 2, [0, 1], tree, 9) is None  # type: ignore[arg-type]
    found = Stated()(env, [pair(0.6), pair(None)], [0, 1], tree, 9)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([0.6, 1.0]))


def test_too_few_pairs_are_named() -> None:
    with pytest.raises(TreadleError, match="9 pairs are too few for folds=5"):
        CrossFitted()(None, [pair(None)] * 9, list(range(9)), None, 9)  # type: ignore[arg-type]
