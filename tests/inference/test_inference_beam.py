"""Beam search: transformers' beams, all texts of a tiny language, groups that part, no leak."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny_generation import END, byte_tokenizer, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.core.errors import TreadleError
from treadle.inference.beam import BeamSearch
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import Decoder
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention

PROMPT = (10, 20, 30)


def likely_end(model: torch.nn.Module, bias: float) -> None:
    """Texts of this model end now and then."""
    logits = model.logits
    change = torch.zeros(257)
    change[END] = bias
    model.logits = lambda hidden: logits(hidden) + change


@pytest.mark.parametrize("bias", [0.0, 4.0, 6.0])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_matches_transformers(bias: float, penalty: float) -> None:
    model = tiny_model()
    peer = transformers_twin(model)
    likely_end(model, bias)
    peer.lm_head.bias = torch.nn.Parameter(torch.zeros(257))
    with torch.no_grad():
        peer.lm_head.bias[END] = bias
    engine = Engine(model, byte_tokenizer())
    request = Request(PROMPT, Sampling(max_tokens=12), n=4)
    ours = BeamSearch(width=4, length_penalty=penalty)(engine, request)
    theirs = peer.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        max_new_tokens=12,
        length_penalty=penalty,
        early_stopping=False,
        eos_token_id=END,
        pad_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for a, b in zip(ours, theirs.sequences[:, len(PROMPT) :].tolist(), strict=True):
        if END in b:
            b = b[: b.index(END) + 1]
        assert list(a.tokens) == b
    scores = [sum(c.logprobs) / len(c.tokens) ** penalty for c in ours]
    torch.testing.assert_close(
        torch.tensor(scores), theirs.sequences_scores.float(), rtol=1e-4, atol=1e-4
    )


def transformers_twin(model) -> LlamaForCausalLM:
    """The same weights in transformers."""
    theta = model.config.blocks[0].mixer.positions.theta
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_theta=theta,
            rms_norm_eps=model.config.norm.eps,
            tie_word_embeddings=False,
        )
    ).eval()
    renamed = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    parts = {"mixer": "self_attn", "ffn": "mlp"}
    norms = {"mixer_norms": "input_layernorm", "ffn_norms": "post_attention_layernorm"}
    weights = {}
    for name, tensor in model.state_dict().items():
        match name.split("."):
            case ["blocks", layer, part, "before", _]:
                name = f"model.layers.{layer}.{norms[part]}"
            case ["blocks", layer, part, leaf, _]:
                name = f"model.layers.{layer}.{parts[part]}.{leaf}_proj"
            case [part, _]:
                name = renamed[part]
        weights[f"{name}.weight"] = tensor
    peer.load_state_dict(weights)
    return peer


def test_exhaustive() -> None:
    """With a beam for every prefix nothing better exists."""
    torch.manual_seed(3)
    blocks = (Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=16)),)
    model = Decoder(vocab=5, dim=8, context=16, blocks=blocks, std=0.7).build().eval()
    engine = Engine(model, byte_tokenizer())
    request = Request((1, 2), Sampling(max_tokens=3), n=3)
    found = BeamSearch(width=25, length_penalty=0.0)(engine, request)
    scores = {}
    for text in product(range(5), repeat=3):
        with torch.no_grad():
            logp = model.logits(model(torch.tensor([1, 2, *text]))).log_softmax(-1)
        scores[text] = sum(float(logp[1 + i, t]) for i, t in enumerate(text))
    assert [c.tokens for c in found] == sorted(scores, key=lambda t: -scores[t])[:3]


@torch.no_grad()
def written_out(model, width: int, groups: int, diversity: float, length: int) -> set[tuple]:
    """Diverse beam search over whole texts, without ends, caches or sharing."""
    each = width // groups
    beams: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in range(groups)]
    for _ in range(length):
        used: list[int] = []
        for group in range(groups):
            found = []
            for score, text in beams[group]:
                logp = model.logits(model(torch.tensor([*PROMPT, *text])))[-1].log_softmax(-1)
                for token in range(len(logp)):
                    total = score + float(logp[token])
                    found.append((total - diversity * used.count(token), total, (*text, token)))
            found.sort(key=lambda item: -item[0])
            beams[group] = [(total, text) for _, total, text in found[:each]]
            used += [text[-1] for _, text in beams[group]]
    return {text for group in beams for _, text in group}


@pytest.mark.parametrize(("groups", "diversity"), [(1, 0.0), (2, 0.3), (3, 1.0), (6, 0.05)])
def test_groups_are_those_written_out(groups: int, diversity: float) -> None:
    model = tiny_model()
    likely_end(model, -50.0)
    engine = Engine(model, byte_tokenizer())
    search = BeamSearch(width=6, groups=groups, diversity=diversity)
    found = search(engine, Request(PROMPT, Sampling(max_tokens=5), n=6))
    assert {c.tokens for c in found} == written_out(model, 6, groups, diversity, 5)


def test_groups_part_and_one_is_plain() -> None:
    engine = Engine(tiny_model(), byte_tokenizer())
    request = Request(PROMPT, Sampling(max_tokens=6), n=4)
    plain = BeamSearch(width=4)(engine, request)
    assert BeamSearch(width=4, groups=1, diversity=9.0)(engine, request) == plain
    parted = BeamSearch(width=4, groups=4, diversity=1e6)(engine, request)
    assert len({c.tokens[0] for c in parted}) == 4
    greedy = engine.generate([Request(PROMPT, Sampling(max_tokens=6, temperature=0.0))])[0][0]
    # The first group sees no penalty: with a width of one it is greedy.
    assert greedy.tokens in {c.tokens for c in parted}


def test_no_page_is_lost() -> None:
    engine = Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache_tokens=16 * 40))
    blocks = engine.scheduler.blocks
    BeamSearch(width=5)(engine, Request(tuple(range(40)), Sampling(max_tokens=40), n=2))
    assert blocks.available == blocks.pages
    small = Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache_tokens=16 * 5))
    with pytest.raises(TreadleError, match=r"all 5 pages.*cache_tokens.*fewer beams"):
        BeamSearch(width=6)(small, Request(tuple(range(40)), Sampling(max_tokens=30)))
    assert small.scheduler.blocks.available == 5


@pytest.mark.parametrize(
    ("beam", "request_", "message"),
    [
        (BeamSearch(width=4, groups=3), Request(PROMPT, Sampling()), "width=4.*groups=3"),
        (BeamSearch(width=2), Request(PROMPT, Sampling(), n=3), "n=3.*BeamSearch.width is 2"),
        (BeamSearch(), Request(PROMPT, Sampling(stop=("x",))), "remove the stop strings"),
    ],
)
def test_bad_requests(beam: BeamSearch, request_: Request, message: str) -> None:
    with pytest.raises(TreadleError, match=message):
        beam(Engine(tiny_model(), byte_tokenizer()), request_)
