"""Attention against a naive loop, and over every layout of the same documents."""

from __future__ import annotations

import pytest
import torch
import transformers
from oracles.attention_loop import attention_loop
from torch import Tensor
from torch.testing import assert_close

from treadle.core.errors import ConfigError
from treadle.nn.alibi import ALiBi
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import Attention, AttentionLayer
from treadle.nn.norms import RMSNorm
from treadle.nn.positions import NoPositions
from treadle.nn.rope import RoPE

DIM = 12
CASES = {
    "mha": Attention(heads=4, head_dim=6),
    "gqa": Attention(heads=4, kv_heads=2, head_dim=6),
    "mqa": Attention(heads=4, kv_heads=1, head_dim=6),
    "no-positions": Attention(heads=2, positions=NoPositions()),
    "window": Attention(heads=4, kv_heads=2, head_dim=6, window=3),
    "softcap": Attention(heads=4, kv_heads=2, head_dim=6, softcap=1.5),
    "softcap-window": Attention(heads=2, head_dim=6, softcap=1.5, window=2),
    "alibi": Attention(heads=6, kv_heads=3, head_dim=4, positions=ALiBi()),
    "alibi-window": Attention(heads=6, head_dim=4, positions=ALiBi(), window=4),
    "qk-norm": Attention(heads=4, kv_heads=2, head_dim=6, qk_norm=RMSNorm(eps=1e-3)),
    "scale": Attention(heads=2, head_dim=6, scale=1.25, positions=RoPE(theta=50.0)),
    "bidirectional": Attention(heads=2, causal=False),
    "bidirectional-window": Attention(heads=2, causal=False, window=2),
}


def layer(config: Attention) -> AttentionLayer:
    torch.manual_seed(0)
    built = config.build(DIM, layer=0).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + (parameter.ndim == 1))
    return built


def loop(config: Attention, built: AttentionLayer, x: Tensor) -> Tensor:
    weights = {n.removesuffix(".weight"): p for n, p in built.named_parameters()}
    rope = config.positions if isinstance(config.positions, RoPE) else None
    width = config.head_dim or DIM // config.heads
    return attention_loop(
        x,
        weights,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        scale=config.scale or width**-0.5,
        theta=rope.theta if rope else None,
        causal=config.causal,
        window=config.window,
        softcap=config.softcap,
        # The slopes of six heads: those of four, then every other of eight.
        slopes=[2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
        if isinstance(config.positions, ALiBi)
        else None,
        norm_eps=1e-3 if config.qk_norm else None,
    )


def gradients(built: AttentionLayer, x: Tensor, y: Tensor) -> list[Tensor]:
    wave = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    return list(torch.autograd.grad((y * wave).sum(), [x, *built.parameters()]))


@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64_loop(name: str) -> None:
    """Packed documents of different lengths equal each document by itself, looped over."""
    config, built = CASES[name], layer(CASES[name])
    layout = Layout((5, 1, 7, 5))
    x = torch.randn(layout.tokens, DIM, dtype=torch.float64, requires_grad=True)
    y = built(x, Packed.of(layout))
    expected = torch.cat([loop(config, built, part) for part in x.split(layout.lengths)])
    # Angles are computed in fp32, as everywhere in the field.
    assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(built, x, y), gradients(built, x, expected), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("bidirectional")])
def test_prompt_trees_equal_separate_documents(name: str) -> None:
    """A prompt computed once gives its completions what a copy for each would give."""
    built = layer(CASES[name])
    layout = Layout.groups([(4, (3, 2, 3)), (6, (1, 5))])
    tokens = torch.randn(layout.tokens, DIM, dtype=torch.float64)
    tree, apart = (tokens.clone().requires_grad_() for _ in range(2))
    y = built(tree, Packed.of(layout))
    leaves = [s for s in range(len(layout.lengths)) if layout.parent(s) >= 0]
    routes = [[t for a in layout.lineage(s) for t in layout.span(a)] for s in leaves]
    copies = built(
        apart[[t for route in routes for t in route]], Packed.of(Layout(tuple(map(len, routes))))
    )
    for leaf, route, part in zip(
        leaves, routes, copies.split([len(r) for r in routes]), strict=True
    ):
        own = list(layout.span(leaf))
        assert_close(y[own], part[-len(own) :])
        assert_close(y[route], part)
    # Gradients of the completions alone: in the copies a prompt's outputs are counted many times.
    mask = torch.zeros(layout.tokens, 1, dtype=torch.float64)
    mask[[t for s in leaves for t in layout.span(s)]] = 1.0
    kept = torch.cat([mask[r] * (torch.tensor(r)[:, None] >= 0) for r in routes])
    (y * mask).square().sum().backward()
    (copies * kept).square().sum().backward()
    assert_close(tree.grad, apart.grad)


def test_rows_equal_packed_documents() -> None:
    """The view of equal rows and the gathered path compute the same."""
    built = layer(CASES["gqa"])
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    rows = built(x.flatten(0, 1), Packed.of(Layout.rows(3, 6))).view(3, 6, -1)
    packed = built(torch.cat([x.flatten(0, 1), x[0, :4]]), Packed.of(Layout((6, 6, 6, 4))))
    assert_close(packed[:18].view(3, 6, -1), rows)
    assert_close(packed[18:], rows[0, :4])


def test_sliding_window_matches_mistral() -> None:
    """One layer of Mistral, over a text longer than its window."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=3,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=31,
        attn_implementation="eager",
    )
    model = transformers.MistralModel(config).double()
    theirs = model.layers[0].self_attn
    attention = Attention(heads=4, kv_heads=2, head_dim=6, window=3)
    built = attention.build(DIM, layer=0).double()
    for name in "qkvo":
        getattr(built, name).weight = getattr(theirs, f"{name}_proj").weight
    seen: dict[str, Tensor] = {}

    def keep(module: object, args: object, kwargs: dict[str, Tensor], out: tuple[Tensor]) -> None:
        seen.update(x=kwargs["hidden_states"].detach().requires_grad_(), y=out[0])

    theirs.register_forward_hook(keep, with_kwargs=True)
    model(torch.randint(0, 31, (2, 11)))
    y = built(seen["x"].flatten(0, 1), Packed.of(Layout.rows(2, 11)))
    assert_close(y, seen["y"].flatten(0, 1), rtol=1e-6, atol=1e-8)
    wave = torch.randn_like(y)
    ours = torch.autograd.grad((y * wave).sum(), list(built.parameters()))
    hf = torch.autograd.grad(
        (seen["y"].flatten(0, 1) * wave).sum(),
        [getattr(theirs, f"{n}_proj").weight for n in "qkvo"],
    )
    for a, b in zip(ours, hf, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Attention(heads=4, kv_heads=3), "kv_heads=3 must divide heads=4"),
        (Attention(heads=5), "heads=5 must divide dim=12, or give head_dim"),
    ],
)
def test_bad_shapes_are_named(config: Attention, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(DIM, layer=0)
