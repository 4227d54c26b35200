"""Guesses by the model's own heads change the number of passes and nothing else."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.mtp_draft import HeadGuesser, MTPHeads
from treadle.inference.request import Request
from treadle.inference.runner import Batch, Runner
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.models.mtp import MTP, AheadHead, ChainedBlock, ChainedLayer, MedusaHead, heads_of
from treadle.nn.context import Packed
from treadle.nn.layout import Layout

FEW = ((256, -99.0), *((t, 9.0) for t in (3, 4, 5)))


def with_heads(head: AheadHead) -> DecoderModel:
    model = tiny_model()
    torch.manual_seed(3)
    MTP(heads=3, head=head)(model)
    heads = heads_of(model)
    assert heads is not None
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def engine(model: DecoderModel, draft: MTPHeads | None, pages: int = 200) -> Engine:
    runner = TorchRunner(model, pages=pages, page=4)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(draft=draft))


@pytest.mark.parametrize("head", [MedusaHead(), ChainedLayer()], ids=str)
@pytest.mark.parametrize("draft", [MTPHeads(), MTPHeads(widths=(3, 2), tokens=2)], ids=str)
@pytest.mark.parametrize("pages", [34, 200])
def test_text_is_that_of_plain_decoding(head: AheadHead, draft: MTPHeads, pages: int) -> None:
    base = Sampling(max_tokens=40, temperature=0.5, logit_bias=FEW, frequency_penalty=0.1)
    asked = [
        Request((5, 6, 7), base, n=2),
        Request((1, 2), base.replace(seed=3, temperature=0.0)),
        Request((*range(30), 3), base.replace(seed=4)),
    ]
    model = with_heads(head)
    plain = engine(model, None).generate(asked)
    it = engine(model, draft, pages)
    found = it.generate(asked)
    for mine, theirs in zip(found, plain, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
    assert 5 < it.accepted < it.guessed
    blocks = it.scheduler.blocks
    assert blocks.available == pages
    assert not any(blocks.references)


@pytest.mark.parametrize("head", [MedusaHead(), ChainedLayer()], ids=str)
def test_guesses_are_what_the_heads_say_of_the_whole_text(head: AheadHead) -> None:
    """Greedy, at every step: from hidden states of one pass over all that is known."""
    model = with_heads(head)
    it = engine(model, MTPHeads(widths=(2,)))
    assert isinstance(it.guesser, HeadGuesser)
    asked = [Request((5, 6, 7), Sampling(temperature=0.0, max_tokens=25, logit_bias=FEW))]
    asked.append(Request((9, 8), Sampling(temperature=0.0, max_tokens=25, logit_bias=FEW)))
    for request in asked:
        it.submit(request)
    heads = heads_of(model)
    assert heads is not None
    seen = 0
    while it.running or it.waiting:
        it.step()
        for sequence, paths in zip(
            it.running, it.guesser.guess(it.running, [3] * len(it.running)), strict=True
        ):
            text = sequence.slice(0, sequence.length)
            for branch, guesses in enumerate(paths):
                # The last known token has no hidden state yet: it is read as what lies between.
                tokens = torch.tensor([*text, *guesses])
                context = Packed.of(Layout((len(tokens),)))
                with torch.no_grad():
                    ahead = heads(model, model(tokens, context), tokens, context)
                    states = [model.logits(state[len(text) - 2]) for state in ahead]
                for k, logits in enumerate(states):
                    for token, bias in FEW:
                        logits[token] += bias
                    assert guesses[k] == logits.topk(2).indices[branch if k == 0 else 0]
                    seen += 1
    assert seen > 100
    assert it.accepted


class Elsewhere(Runner):
    """A runner that is not plain torch."""

    page, pages, vocab, context = 4, 8, 257, 64

    def run(self, batch: Batch) -> torch.Tensor:
        raise AssertionError

    def copy(self, source: int, target: int) -> None:
        raise AssertionError

    def save(self, page: int) -> torch.Tensor:
        raise AssertionError

    def load(self, page: int, content: torch.Tensor) -> None:
        raise AssertionError


def test_models_that_cannot_guess_are_named() -> None:
    with pytest.raises(ConfigError, match="no heads ahead: train it with the transform MTP"):
        engine(tiny_model(), MTPHeads())
    with pytest.raises(ConfigError, match="ChainedBlock attend to the whole text"):
        engine(with_heads(ChainedBlock()), MTPHeads())
    with pytest.raises(ConfigError, match="tokens=4, but the model has 3 heads"):
        engine(with_heads(MedusaHead()), MTPHeads(tokens=4))
    compiled = TorchRunner(with_heads(MedusaHead()), pages=8, page=16)
    compiled.advance = compiled.run  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="a compiled step keeps to itself"):
        MTPHeads().open(compiled, byte_tokenizer())
    with pytest.raises(TreadleError, match="plain torch, not Elsewhere: take NGram"):
        MTPHeads().open(Elsewhere(), byte_tokenizer())
