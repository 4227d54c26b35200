"""Mixtures of adapters: one-hot routing is that adapter, routers beside loops, switches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_models import TinyExpert, nowhere
from peft_pair import logits, tiny, trained

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.adapter import disabled, merge
from treadle.peft.experts import check_same_base
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA, LoRALinear
from treadle.peft.low_rank import RankStabilised
from treadle.peft.mixture import (
    MixtureOfAdapters,
    Routing,
    Switched,
    TokenRouter,
    TokenRouting,
    mixtures,
    routed,
    switch,
)
from treadle.peft.request_router import RequestRouter, fit_router

EXPERTS = (
    TinyExpert(transforms=(LoRA(rank=3),), seed=1),
    TinyExpert(transforms=(LoRA(rank=2, targets=("q", "v", "down"), alpha=3.0),), seed=2),
    TinyExpert(transforms=(LoRA(rank=5, scaling=RankStabilised(), alpha=1.0),), seed=3),
)


def mixed(routing: Routing) -> DecoderModel:
    return MixtureOfAdapters(experts=EXPERTS, routing=routing).open(nowhere()).model


def test_one_hot_routing_equals_that_adapter() -> None:
    model = mixed(Switched())
    alone = [logits(expert.open(nowhere()).model) for expert in EXPERTS]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    for place, expected in enumerate(alone):
        switch(model, torch.eye(3)[place])
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny()))


def test_shares_mix_the_weights() -> None:
    """W + sum g_i s_i B_i A_i written out, then merged."""
    model, shares = mixed(Switched()), (0.5, 0.2, -0.4)
    switch(model, shares)
    plain = tiny()
    with torch.no_grad():
        for share, expert in zip(shares, EXPERTS, strict=True):
            for name, layer in expert.open(nowhere()).model.named_modules():
                if isinstance(layer, LoRALinear):
                    plain.get_submodule(name).weight += share * layer.scale * layer.B @ layer.A
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merge(model)), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top", [None, 1, 2])
def test_router_of_tokens_beside_a_loop(top: int | None) -> None:
    """Outputs, and the gradients of R and of the input."""
    torch.manual_seed(0)
    model = mixed(TokenRouting(top=top))
    assert {name.rpartition(".")[2] for name in trained(model)} == {"R"}
    layer = mixtures(model)[0]
    assert isinstance(layer.router, TokenRouter)
    found: dict[str, list[LoRALinear]] = {}
    for expert in EXPERTS:
        for name, part in expert.open(nowhere()).model.named_modules():
            if isinstance(part, LoRALinear):
                found.setdefault(name, []).append(part)
    parts = found["blocks.0.mixer.q"]
    R = torch.randn(3, 32, requires_grad=True)
    with torch.no_grad():
        layer.router.R.copy_(R)
    x = torch.randn(6, 32, requires_grad=True)
    rows = []
    for row in x:
        scores = R @ row
        kept = scores.sort(descending=True).indices[: top or 3]
        shares = torch.zeros(3).index_put((kept,), scores[kept].softmax(0))
        y = layer.base(row)
        for share, part in zip(shares, parts, strict=True):
            y = y + share * part.scale * part.B @ (part.A @ row)
        rows.append(y)
    expected, ours = torch.stack(rows), layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x.view(2, 3, 32)), ours.view(2, 3, -1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.3)
    weight = torch.randn(expected.shape)
    mine = torch.autograd.grad((ours * weight).sum(), (layer.router.R, x))
    theirs = torch.autograd.grad((expected * weight).sum(), (R, x))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert top == 1 or mine[0].abs().max() > 1e-3


def test_it_starts_as_the_mean_and_nothing_else_can_train() -> None:
    expected = mixed(Switched())
    model = mixed(TokenRouting())
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert not trained(expected)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    LoRA(rank=2, targets=("head",))(model)  # what comes later does not wake the experts
    assert {n.rpartition(".")[2] for n in trained(model)} == {"R", "A", "B"}
    assert not any(n.endswith((".A", ".B")) for n in trained(model) if "head" not in n)


def test_each_document_of_a_batch_has_its_own_adapter() -> None:
    model = mixed(Switched())
    layout = Layout((3, 5, 4))
    tokens = torch.arange(12) % 7
    gates = torch.eye(3)[torch.tensor([2, 0, 1])]
    before = logits(model)
    with routed(model, layout, gates):
        hidden = model(tokens, Packed.of(layout))
        with pytest.raises(ConfigError, match="has no single weight"):
            merge(model)
    assert torch.equal(logits(model), before)
    for part, document, expert in zip(
        hidden.split((3, 5, 4)), tokens.split((3, 5, 4)), (2, 0, 1), strict=True
    ):
        alone = EXPERTS[expert].open(nowhere()).model(document)
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-4)


def test_requests_find_their_expert() -> None:
    """Prompts of different words; against cosines written out."""
    torch.manual_seed(0)
    model = mixed(Switched())
    own = [torch.randint(8 * i, 8 * i + 2, (6, 9)).tolist() for i in range(3)]
    router = fit_router(model, [prompts[:4] for prompts in own])
    assert [router(model, prompts[4:]).tolist() for prompts in own] == [[0, 0], [1, 1], [2, 2]]
    plain = tiny()
    means = [torch.stack([plain(torch.tensor(p)).mean(0) for p in o[:4]]).mean(0) for o in own]
    middle = torch.stack(means).mean(0)
    torch.testing.assert_close(router.middle, middle.detach(), rtol=1e-4, atol=1e-4)
    for place, mean in enumerate(means):
        away = (mean - middle).detach()
        torch.testing.assert_close(
            router.centroids[place], away / away.square().sum().sqrt(), rtol=1e-3, atol=1e-3
        )
    gates = router.gates(model, own[2][4:])
    assert torch.equal(gates, torch.eye(3)[[2, 2]])
    assert gates.dtype == torch.float32

    other = RequestRouter(torch.randn(32), F.normalize(torch.randn(5, 32)))
    texts = torch.randint(0, 32, (40, 3)).tolist()
    away = torch.stack([plain(torch.tensor(text)).mean(0) for text in texts]) - other.middle
    cosines = torch.cosine_similarity(away[:, None], other.centroids, dim=-1)
    assert other(model, texts).tolist() == cosines.argmax(1).tolist()
    assert len(set(cosines.argmax(1).tolist())) > 1


def test_mistakes_are_named() -> None:
    def opened(*experts: TinyExpert, routing: Routing = Switched()) -> DecoderModel:
        return MixtureOfAdapters(experts=experts, routing=routing).open(nowhere()).model

    with pytest.raises(ConfigError, match="model 2 was trained on another base"):
        opened(EXPERTS[0], EXPERTS[1].replace(base_seed=7))
    with pytest.raises(ConfigError, match="model 2 is of another shape"):
        opened(EXPERTS[0], EXPERTS[1].replace(dim=64))
    with pytest.raises(ConfigError, match="model 2 has no adapters"):
        opened(EXPERTS[0], TinyExpert())
    with pytest.raises(ConfigError, match="expert 2 has a IA3Linear on"):
        opened(EXPERTS[0], TinyExpert(transforms=(IA3(),)))
    with pytest.raises(ConfigError, match="top=3, but there are only 2 experts"):
        opened(*EXPERTS[:2], routing=TokenRouting(top=3))
    with pytest.raises(ConfigError, match="2 shares for 3 experts"):
        switch(mixed(Switched()), (0.5, 0.5))
    with pytest.raises(ConfigError, match="open it with Switched"):
        switch(mixed(TokenRouting()), (1.0, 0.0, 0.0))
    with pytest.raises(ConfigError, match="has no mixture of adapters"):
        switch(tiny(), (1.0,))
    with pytest.raises(ConfigError, match="has no single weight"):
        merge(mixed(TokenRouting()))
    with pytest.raises(ConfigError, match="expert 1 has no prompts"):
        fit_router(tiny(), [[[1, 2]], []])


def test_a_base_that_was_only_rounded_is_the_same() -> None:
    first, other = tiny(), tiny()
    with torch.no_grad():
        for model in (first, other):
            model.embedding.weight.mul_(100)
    check_same_base(first, other.bfloat16(), "MixtureOfAdapters", 2)


def test_a_switch_is_one_write() -> None:
    model = mixed(Switched())
    assert len(mixtures(model)) == 14
    assert len({id(layer.router) for layer in mixtures(model)}) == 1
