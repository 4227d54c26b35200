"""Heads that look further ahead, against transformers and against the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.llama import tiny_llama
from treadle.models.mtp import (
    MTP,
    AheadHead,
    AheadHeads,
    ChainedBlock,
    ChainedLayer,
    MedusaHead,
    ParallelBlock,
    heads_of,
)
from treadle.models.transform import transformed
from treadle.nn.context import Packed
from treadle.nn.ffn.ffn import MLP
from treadle.nn.layout import Layout
from treadle.peft.chosen import ChosenLayers
from treadle.train.run import load_trained, save_trained

TINY = tiny_llama(61, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, context=64)
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])


def with_heads(head: AheadHead, heads: int = 2, decoder: Decoder = TINY) -> DecoderModel:
    torch.manual_seed(0)
    model = MTP(heads=heads, head=head)(decoder.replace(std=0.2).build())
    with torch.no_grad():
        for parameter in heads_in(model).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def heads_in(model: DecoderModel) -> AheadHeads:
    found = heads_of(model)
    assert found is not None
    return found


def ahead(model: DecoderModel) -> list[Tensor]:
    context = Packed.of(Layout((len(TOKENS),)))
    found: list[Tensor] = heads_in(model)(model, model(TOKENS, context), TOKENS, context)
    return found


NAMES = {
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "mixer_norms.before": "input_layernorm",
    "ffn_norms.before": "post_attention_layernorm",
}


def test_chained_blocks_match_transformers() -> None:
    """Hidden states of two heads in a row, and the gradients of all weights."""
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    layers = pytest.importorskip("transformers.modeling_layers")
    model = with_heads(ChainedBlock())
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=model.config.norm.eps,
        rope_theta=10000.0,
        attn_implementation="eager",
    )
    width = len(TOKENS)
    rotary = llama.LlamaRotaryEmbedding(config)
    mask = torch.full((1, 1, width, width), float("-inf")).triu(1)
    hidden = model(TOKENS)
    theirs, reference = hidden.detach()[None], []
    for k, ours in enumerate(heads_in(model).layers, 1):
        layer = layers.MtpLayer(config, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, k)
        state = {
            "enorm.weight": ours.joined.token_norm.weight,
            "hnorm.weight": ours.joined.hidden_norm.weight,
            "eh_proj.weight": ours.joined.M.weight,
            "post_norm.weight": ours.norm.weight,
            **{
                f"mtp_block.{there}.weight": ours.block.get_submodule(here).weight
                for here, there in NAMES.items()
            },
        }
        layer.load_state_dict({n: t.detach().clone() for n, t in state.items()})
        embedded = model.embedding(TOKENS.roll(-k)).detach()[None]
        positions = torch.arange(width)[None]
        theirs = layer(embedded, theirs, rotary(embedded, positions), mask, positions, None)
        reference.append((theirs[0], layer, state))
    found = ahead(model)
    for (expected, _, _), got in zip(reference, found, strict=True):
        assert_close(got, expected, atol=2e-5, rtol=1e-4)
    weights = [torch.randn_like(t) for t in found]
    sum((w * t).sum() for w, t in zip(weights, found, strict=True)).backward()
    sum((w * t).sum() for w, (t, _, _) in zip(weights, reference, strict=True)).backward()
    for _, layer, state in reference:
        for name, parameter in layer.named_parameters():
            assert_close(state[name].grad, parameter.grad, atol=1e-3, rtol=1e-3)


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    weight = norm.weight.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_layers_of_one_place_are_their_formulas() -> None:
    """In float64, token by token."""
    model = with_heads(ChainedLayer(ffn=MLP(hidden=40, activation="relu")))
    trunk = model(TOKENS).detach().double()
    before = trunk
    for k, (layer, got) in enumerate(zip(heads_in(model).layers, ahead(model), strict=True), 1):
        rows = []
        for i in range(len(TOKENS) - k):
            e = model.embedding.weight[TOKENS[i + k]].double()
            joined = layer.joined
            both = torch.cat([rms(e, joined.token_norm), rms(before[i], joined.hidden_norm)])
            x = joined.M.weight.double() @ both
            up = (layer.ffn.up.weight.double() @ x + layer.ffn.up.bias.double()).clamp(min=0)
            x = x + layer.ffn.down.weight.double() @ up + layer.ffn.down.bias.double()
            rows.append(rms(x, layer.norm))
        before = torch.stack(rows)
        assert_close(got[: len(rows)].double(), before, atol=1e-4, rtol=1e-4)
    medusa = with_heads(MedusaHead())
    for layer, got in zip(heads_in(medusa).layers, ahead(medusa), strict=True):
        z = trunk @ layer.W.weight.double().T + layer.W.bias.double()
        assert_close(got.double(), trunk + z / (1 + (-z).exp()), atol=1e-4, rtol=1e-4)


def test_parallel_blocks_all_read_the_trunk() -> None:
    model = with_heads(ParallelBlock())
    context = Packed.of(Layout((len(TOKENS),)))
    hidden = model(TOKENS, context)
    for layer, got in zip(heads_in(model).layers, ahead(model), strict=True):
        assert_close(got, layer.block(hidden, context))


def test_at_first_a_head_says_what_the_model_says() -> None:
    """Medusa's exactly; a chained one passes the normed hidden state on."""
    torch.manual_seed(0)
    model = MTP(heads=2, head=MedusaHead())(TINY.build())
    for got in ahead(model):
        assert_close(got, model(TOKENS))
    joined = heads_in(MTP(heads=1)(TINY.build())).layers[0].joined
    hidden, between = torch.randn(2, 5, 32)
    assert_close(joined(hidden, between), joined.hidden_norm(hidden))


def test_heads_alone_are_trained_and_kept(tmp_path) -> None:
    transforms = (MTP(heads=2), ChosenLayers(layers=("mtp",)))
    model = transformed(TINY.build(), transforms)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith("mtp.") for n in trained)
    with torch.no_grad():
        for parameter in heads_in(model).parameters():
            parameter.normal_()
    save_trained(model, dict(model.named_parameters()), tmp_path / "t.safetensors")
    again = transformed(TINY.build(), transforms)
    load_trained(again, tmp_path / "t.safetensors")
    assert_close(heads_in(again).state_dict(), heads_in(model).state_dict())


def test_what_cannot_have_heads_is_named() -> None:
    with pytest.raises(ConfigError, match="MTP: a Linear is no decoder"):
        MTP()(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="has heads ahead already"):
        MTP()(MTP()(TINY.build()))


def test_blocks_are_like_the_last_one() -> None:
    ffns = [MLP(hidden=width) for width in (40, 48, 56)]
    blocks = tuple(TINY.blocks[0].replace(ffn=ffn) for ffn in ffns)
    model = MTP(heads=1, head=ParallelBlock())(TINY.replace(blocks=blocks).build())
    assert heads_in(model).layers[0].block.ffn.up.weight.shape == (56, 32)
