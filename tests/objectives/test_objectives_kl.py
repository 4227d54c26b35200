"""KL estimators against the exact sums over a small vocabulary, values and gradients."""

from __future__ import annotations

import pytest
import torch

from treadle.objectives.kl import K1, K2, K3


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    z, r = torch.randn(2, 11, generator=g, dtype=torch.float64)
    return z.requires_grad_(), r.log_softmax(-1)


def exact(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    return (logp.exp() * (logp - ref)).sum()


@pytest.mark.parametrize("estimate", [K1(), K3()])
def test_means_are_the_exact_kl(estimate) -> None:
    """The mean over samples of pi, as a sum over the whole vocabulary."""
    z, ref = distributions()
    logp = z.log_softmax(-1)
    mean = (logp.exp() * estimate(logp, ref)).sum()
    torch.testing.assert_close(mean, exact(logp, ref))
    assert float(mean) > 0.1


def test_k2_is_right_to_second_order_only() -> None:
    z, ref = distributions()
    for scale, tolerance in ((1e-2, 2e-2), (1e-3, 2e-3)):
        logp = (ref + scale * z).log_softmax(-1)
        mean = (logp.exp() * K2()(logp, ref)).sum()
        assert abs(float(mean / exact(logp, ref)) - 1) < tolerance
    logp = z.log_softmax(-1)
    assert abs(float((logp.exp() * K2()(logp, ref)).sum() - exact(logp, ref))) > 1e-2


def gradient(loss: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, z)[0]


def test_gradients_in_the_mean() -> None:
    """On samples of pi: k2's is that of the KL, k1's is nothing, k3's is neither."""
    z, ref = distributions()
    logp = z.log_softmax(-1)
    p = logp.detach().exp()
    wanted = gradient(exact(z.log_softmax(-1), ref), z)
    torch.testing.assert_close(gradient((p * K2()(z.log_softmax(-1), ref)).sum(), z), wanted)
    nothing = gradient((p * K1()(z.log_softmax(-1), ref)).sum(), z)
    torch.testing.assert_close(nothing, torch.zeros_like(z), atol=1e-12, rtol=0)
    k3 = gradient((p * K3()(z.log_softmax(-1), ref)).sum(), z)
    reverse = gradient((ref.exp() * (ref - z.log_softmax(-1))).sum(), z)
    torch.testing.assert_close(k3, reverse)


def test_never_negative() -> None:
    z, ref = distributions()
    logp = z.log_softmax(-1)
    assert (K1()(logp, ref) < 0).any()
    assert (K2()(logp, ref) >= 0).all()
    assert (K3()(logp, ref) >= 0).all()
