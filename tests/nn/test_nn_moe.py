"""Mixtures of experts: a loop over tokens, routing rules, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.kernels.grouped import grouped_linear, grouped_linear_reference
from treadle.models.decoder import swap
from treadle.models.llama import tiny_llama
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE, Router, SigmoidGated, SigmoidOfTop, SoftmaxOfTop, TopOfSoftmax

ROUTERS = (SoftmaxOfTop(), TopOfSoftmax(), SigmoidOfTop(scale=2.5))


def weights_by_paper(router: Router, scores: Tensor, chosen: Tensor) -> Tensor:
    """Of one token, in float64."""
    if isinstance(router, TopOfSoftmax):
        return (scores.exp() / scores.exp().sum())[chosen]
    raw = scores.exp() if isinstance(router, SoftmaxOfTop) else 1 / (1 + (-scores).exp())
    factor = router.scale if isinstance(router, SigmoidOfTop) else 1.0
    return factor * raw[chosen] / raw[chosen].sum()


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("shared", [None, GatedMLP(hidden=7)])
def test_matches_a_loop_over_tokens(router: Router, shared: GatedMLP | None) -> None:
    """Outputs and gradients; one expert has no token."""
    torch.manual_seed(0)
    config = MoE(expert=GatedMLP(hidden=12), experts=5, top_k=2, router=router, shared=shared)
    layer = config.build(8).double()
    layer.experts.initialise(0.5, 0.5)
    with torch.no_grad():
        layer.router.weight.normal_()
        layer.router.weight[3] = -50 * layer.router.weight.sum(0).abs()
    x = torch.rand(11, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    rows, used = [], set()
    for token in x:
        scores = layer.router.weight @ token
        chosen = scores.argsort(descending=True)[:2]
        used |= set(chosen.tolist())
        weights = weights_by_paper(router, scores, chosen)
        row = torch.zeros(8, dtype=torch.float64)
        for e, w in zip(chosen, weights, strict=True):
            gate, up, down = (
                t[e] for t in (layer.experts.gate, layer.experts.up, layer.experts.down)
            )
            inner = gate @ token
            row = row + w * (down @ (inner * torch.sigmoid(inner) * (up @ token)))
        if layer.shared is not None:
            row = row + layer.shared(token[None])[0]
        rows.append(row)
    assert 3 not in used
    # scores are turned into weights in fp32
    torch.testing.assert_close(y, torch.stack(rows), rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad((y * probe).sum(), leaves)
    expected = torch.autograd.grad((torch.stack(rows) * probe).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_grouped_products_equal_their_definition() -> None:
    torch.manual_seed(1)
    counts = torch.tensor([3, 0, 4, 1])
    x, w = torch.randn(8, 16), torch.randn(4, 24, 16)
    expected = torch.stack([w[e] @ row for e, row in zip([0, 0, 0, 2, 2, 2, 2, 3], x, strict=True)])
    torch.testing.assert_close(grouped_linear(x, w, counts), expected, rtol=1e-4, atol=1e-5)
    # the call that accelerators take, where this machine has it too
    ends = counts.cumsum(0).to(torch.int32)
    fused = F.grouped_mm(x, w.transpose(1, 2), offs=ends)
    torch.testing.assert_close(fused, grouped_linear_reference(x, w, counts))


def test_a_gated_shared_expert_is_scaled_by_its_own_sigmoid() -> None:
    torch.manual_seed(2)
    layer = SigmoidGated(ffn=GatedMLP(hidden=6)).build(4)
    x = torch.randn(5, 4)
    expected = torch.stack([torch.sigmoid(layer.switch.weight[0] @ row) for row in x])
    torch.testing.assert_close(layer(x), expected[:, None] * layer.ffn(x))


def test_a_dense_model_becomes_a_mixture_and_learns() -> None:
    """`swap` gives a Llama experts; each of them gets gradients and the loss falls."""
    torch.manual_seed(0)
    dense = tiny_llama(32, dim=16, layers=2, heads=2)
    tree = swap(dense, GatedMLP, lambda f: MoE(expert=f, experts=3, top_k=2))
    model = tree.build()
    assert float(model.blocks[0].ffn.experts.gate.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.blocks[0].ffn.experts.down.detach().std()) == pytest.approx(0.01, rel=0.1)
    tokens = torch.randint(0, 32, (4, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        logits = model.logits(model(tokens))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_bad_mixtures_are_refused() -> None:
    expert = GatedMLP(hidden=4)
    with pytest.raises(ConfigError, match="top_k=3 of 2 experts"):
        MoE(expert=expert, experts=2, top_k=3).build(4)
    with pytest.raises(ConfigError, match=r"set expert\.bias to false"):
        MoE(expert=expert.replace(bias=True), experts=2, top_k=1).build(4)
