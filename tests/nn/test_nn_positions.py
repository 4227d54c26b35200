"""Rotary positions and their scalings against transformers; ALiBi against BLOOM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from treadle.core.errors import ConfigError
from treadle.models.hub.hf_config import HfConfig
from treadle.models.hub.hf_rope import rope_from_hf, scaling_to_hf
from treadle.nn.alibi import ALiBi
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.rope import RoPE, Scaling
from treadle.nn.rope_scaling import (
    DividedFrequencies,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    YaRN,
)

CONTEXT, HEAD_DIM, THETA = 256, 32, 5_000.0
SHORT = tuple(1.0 + 0.05 * i for i in range(HEAD_DIM // 2))
LONG = tuple(1.5 + 0.5 * i for i in range(HEAD_DIM // 2))
MSCALE = (0.1 * 0.7 * math.log(40) + 1) / (0.1 * 1.2 * math.log(40) + 1)
ORIGINAL = {"original_max_position_embeddings": 64}
SCALINGS: dict[str, tuple[dict[str, Any], Scaling]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(factor=4.0)),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 3.0},
        DynamicNTK(factor=3.0, original_context=CONTEXT),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
        YaRN(factor=4.0, original_context=64),
    ),
    "yarn-betas": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 9.0, "beta_slow": 0.5, **ORIGINAL},
        YaRN(factor=4.0, original_context=64, beta_fast=9.0, beta_slow=0.5),
    ),
    "yarn-not-truncated": (
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, **ORIGINAL},
        YaRN(factor=4.0, original_context=64, truncate=False),
    ),
    "yarn-attention": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **ORIGINAL},
        YaRN(factor=4.0, original_context=64, attention=0.7),
    ),
    "yarn-mscale": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2, **ORIGINAL},
        YaRN(factor=40.0, original_context=64, attention=MSCALE),
    ),
    "longrope": (
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **ORIGINAL},
        LongRoPE(short=SHORT, long=LONG, original_context=64, factor=4.0),
    ),
    "longrope-attention": (
        {
            "rope_type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 4.0,
            "attention_factor": 1.3,
            **ORIGINAL,
        },
        LongRoPE(short=SHORT, long=LONG, original_context=64, factor=4.0, attention=1.3),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **ORIGINAL,
        },
        Llama3Scaling(factor=8.0, original_context=64),
    ),
}


def hf_config(table: dict[str, Any]) -> transformers.LlamaConfig:
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
    return transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": THETA, **listed},
    )


@pytest.mark.parametrize("length", [10, 64, 65, 256, 700])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_match_transformers(name: str, length: int) -> None:
    table, scaling = SCALINGS[name]
    compute = ROPE_INIT_FUNCTIONS[table["rope_type"]]
    inverse, attention = compute(hf_config(table), "cpu", seq_len=length)
    base = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    ours = scaling(base, THETA, length)
    assert_close(ours.inverse, inverse, rtol=1e-6, atol=0)
    assert ours.attention == pytest.approx(attention, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_configs_are_read_and_written(name: str) -> None:
    table, scaling = SCALINGS[name]
    data = {"rope_parameters": {"rope_theta": THETA, **table}}
    rope = rope_from_hf(HfConfig(data), context=CONTEXT)
    if name == "yarn-mscale":
        assert isinstance(rope.scaling, YaRN)
        assert rope.scaling.attention == pytest.approx(MSCALE)
    else:
        assert rope == RoPE(theta=THETA, scaling=scaling)
    legacy = {"rope_theta": THETA, "rope_scaling": scaling_to_hf(rope.scaling)}
    assert rope_from_hf(HfConfig(legacy), context=CONTEXT) == rope


@pytest.mark.parametrize("name", [None, *SCALINGS])
def test_rotation_matches_llama(name: str | None) -> None:
    """Queries, keys and their gradients, over a text longer than any context named."""
    table = SCALINGS[name][0] if name else {"rope_type": "default"}
    rope = RoPE(theta=THETA)
    if name:
        rope = rope.replace(scaling=SCALINGS[name][1])
    q, k = (torch.randn(300, heads, HEAD_DIM, requires_grad=True) for heads in (4, 2))
    ours = rope.rotate(q, k, Packed.of(Layout((300,))))
    embedding = LlamaRotaryEmbedding(hf_config(table))
    cos, sin = embedding(q, torch.arange(300)[None])
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for a, b, x in zip(ours, theirs, (q, k), strict=True):
        b = b[0].transpose(0, 1)
        # An angle of 300 has an error of 2e-5 in fp32.
        assert_close(a, b, rtol=1e-4, atol=1e-4)
        wave = torch.randn_like(a)
        assert_close(
            *(torch.autograd.grad((y * wave).sum(), x)[0] for y in (a, b)), rtol=1e-4, atol=1e-4
        )


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, HEAD_DIM, dtype=torch.float64)
    rope = RoPE()
    q, k = (t.expand(50, 1, HEAD_DIM) for t in (q, k))
    turned_q, turned_k = rope.rotate(q, k, Packed.of(Layout((50,))))
    scores = turned_q[:, 0] @ turned_k[:, 0].T
    for distance in (0, 7, 30):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


def test_partial_rotation_leaves_the_rest() -> None:
    q = torch.randn(20, 2, HEAD_DIM)
    turned, _ = RoPE(fraction=0.25).rotate(q, q, Packed.of(Layout((20,))))
    whole, _ = RoPE().rotate(q[..., :8], q[..., :8], Packed.of(Layout((20,))))
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert torch.equal(turned[..., :8], whole)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 14, 32])
def test_alibi_matches_bloom(heads: int) -> None:
    """BLOOM adds slope * position of the key: our slopes times minus the distance, plus a constant
    of the query, which the softmax does not see."""
    length = 9
    bloom = build_alibi_tensor(torch.ones(1, length), heads, torch.float32)[:, 0]
    slopes = ALiBi().slopes(heads)
    assert slopes is not None
    assert len(slopes) == heads
    distance = (length - 1) - torch.arange(length)
    ours = -torch.tensor(slopes)[:, None] * distance
    assert_close(ours.softmax(-1), bloom.softmax(-1))
    assert_close(torch.tensor(slopes), bloom[:, 1])


def test_factors_must_fit_the_head() -> None:
    rope = RoPE(scaling=DividedFrequencies(divisors=(1.0, 2.0)))
    q = torch.randn(3, 1, HEAD_DIM)
    with pytest.raises(ConfigError, match="DividedFrequencies: 2 factors for 16 frequencies"):
        rope.rotate(q, q, Packed.of(Layout((3,))))
