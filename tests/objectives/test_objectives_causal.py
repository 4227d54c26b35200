"""Causal language modelling against transformers: loss and gradients, packed against padded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from treadle.data.batch import Piece, assemble
from treadle.models.decoder import Decoder, LinearHead
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import RMSNorm
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.objective import Objective

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
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


def theirs_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, layer, *rest = name.removesuffix(".weight").split(".")
    return f"model.layers.{layer}.{NAMES['.'.join(rest)]}.weight"


def pair():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    block = Block(
        mixer=Attention(heads=4, kv_heads=2), ffn=GatedMLP(hidden=48), norm=RMSNorm(eps=1e-6)
    )
    ours = Decoder(
        vocab=61, dim=32, context=64, blocks=(block,) * 2, norm=RMSNorm(eps=1e-6), std=0.2
    ).build()
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.LlamaForCausalLM(config)
    state = {theirs_name(n): p.detach().clone() for n, p in ours.named_parameters()}
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    return ours, theirs


def documents() -> tuple[list[list[int]], list[list[bool]]]:
    generator = torch.Generator().manual_seed(2)
    lengths = (5, 12, 12, 3, 20)
    tokens = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    learn = [torch.rand(n, generator=generator).lt(0.6).tolist() for n in lengths]
    return tokens, learn


def test_matches_transformers() -> None:
    """Packed documents with masked tokens give the loss and gradients of padded rows."""
    ours, theirs = pair()
    tokens, learn = documents()
    batch = assemble([Piece(t, m) for t, m in zip(tokens, learn, strict=True)])
    output = CausalLM()(ours, batch)
    loss = output.total / output.weight
    loss.backward()

    longest = max(map(len, tokens))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens])
    attend = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in tokens])
    labels = torch.full_like(ids, -100)
    for row, (t, m) in enumerate(zip(tokens, learn, strict=True)):
        for i, (token, wanted) in enumerate(zip(t, m, strict=True)):
            if wanted:
                labels[row, i] = token
    expected = theirs(input_ids=ids, attention_mask=attend, labels=labels).loss
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[theirs_name(name)].grad, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("objective", [CausalLM(), Distil(terms=(HardLabels(),))], ids=str)
def test_weights_biases_and_caps_count(objective: Objective) -> None:
    plain, _ = pair()
    torch.manual_seed(3)
    model = plain.config.replace(head=LinearHead(bias=True), softcap=2.0).build()
    torch.nn.init.normal_(model.head.bias)
    tokens, learn = documents()
    batch = assemble([Piece(t, m) for t, m in zip(tokens, learn, strict=True)])
    batch = replace(batch, weights=torch.rand(len(batch.weights)))
    output = objective(model, batch)
    logits = model.head(model(batch.tokens, batch.context())[batch.sources])
    losses = F.cross_entropy(2 * torch.tanh(logits / 2), batch.targets, reduction="none")
    expected = (batch.weights * losses).sum()
    torch.testing.assert_close(output.total, expected)
    assert output.weight == batch.weights.sum()
    parameters = list(model.parameters())
    ours = torch.autograd.grad(output.total, parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accuracy_counts_likeliest_tokens() -> None:
    ours, _ = pair()
    tokens, learn = documents()
    batch = assemble([Piece(t, m) for t, m in zip(tokens, learn, strict=True)])
    logits = ours.logits(ours(batch.tokens, batch.context()))[batch.sources]
    expected = (logits.argmax(-1) == batch.targets).sum()
    assert CausalLM()(ours, batch).metrics["accuracy"] == expected
