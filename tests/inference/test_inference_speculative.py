"""Speculation changes the number of passes and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model
from tokenizers import Tokenizer as Backend
from tokenizers import models

from treadle.core.errors import ConfigError
from treadle.inference.draft_model import DraftModel, EarlyExit, ModelGuesser
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.runner import Runner
from treadle.inference.sampling import Sampling
from treadle.inference.speculative import Draft, Guesser, NGram
from treadle.inference.torch_runner import TorchRunner
from treadle.models.hub.save import save_hf
from treadle.tokenizers.tokenizer import Tokenizer

# Few tokens in turn and no end: texts that repeat themselves.
REPETITIVE = ((256, -99.0), *((t, 9.0) for t in (3, 4, 5)))


class Noisy(Draft):
    """A draft model that is the model itself with other weights to some degree."""

    noise: float

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        assert isinstance(runner, TorchRunner)
        model = copy.deepcopy(runner.model)
        torch.manual_seed(5)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + self.noise * torch.randn_like(weight))
        return ModelGuesser(model, runner, tokenizer, 4)


DRAFTS = (
    NGram(shortest=1),
    NGram(shortest=1, branches=3),
    EarlyExit(layers=1),
    EarlyExit(layers=1, widths=(3, 2)),
    Noisy(noise=0.03),
    Noisy(noise=0.0),
)


def engine(*windows: int | None, pages: int = 200, draft: Draft | None = None) -> Engine:
    runner = TorchRunner(tiny_model(*windows), pages=pages, page=4)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(draft=draft))


def requests(**sampling) -> list[Request]:
    base = Sampling(max_tokens=40, logit_bias=REPETITIVE, **sampling)
    prompts = [(5, 6, 7, 8, 5, 6), (1, 2), (*range(30), 3, 4, 5)]
    return [Request(p, base.replace(seed=i), n=1 + i % 2) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("windows", [(), (6, None)], ids=str)
@pytest.mark.parametrize("pages", [34, 200])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("draft", DRAFTS, ids=str)
def test_text_is_that_of_plain_decoding(windows, pages: int, sampling, draft: Draft) -> None:
    """Greedy and sampled: every seed's text is the same, so the distribution is."""
    asked = requests(**sampling)
    plain = engine(*windows).generate(asked)
    it = engine(*windows, pages=pages, draft=draft)
    found = it.generate(asked)
    assert 5 < it.accepted <= it.guessed
    for mine, theirs in zip(found, plain, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert it.scheduler.blocks.available == pages
    assert not any(it.scheduler.blocks.references)
    if isinstance(it.guesser, ModelGuesser):
        it.guesser.guess([], [])
        assert it.guesser.blocks.available == pages


def passes(it: Engine, request: Request) -> int:
    count = 0
    it.submit(request)
    while it.running or it.waiting:
        it.step()
        count += 1
    return count


def test_right_guesses_save_passes() -> None:
    """Five tokens a pass at best."""
    request = Request((1, 2), Sampling(temperature=0.0, max_tokens=60, logit_bias=REPETITIVE))
    assert passes(engine(), request) == 60
    assert passes(engine(draft=NGram()), request) < 40


def test_the_model_itself_guesses_right() -> None:
    """Sampled too, by the same random numbers: all but what an end cuts off."""
    it, read = engine(draft=Noisy(noise=0.0)), []
    assert isinstance(it.guesser, ModelGuesser)
    run = it.guesser.runner.run
    it.guesser.runner.run = lambda batch: read.append(len(batch.tokens)) or run(batch)  # type: ignore[func-returns-value,method-assign]
    request = Request((1, 2), Sampling(temperature=1.0, max_tokens=61, logit_bias=((256, -99.0),)))
    assert passes(it, request) == 1 + 60 // 5
    assert it.accepted == it.guessed == 48
    assert sum(read) <= 2 + 61  # the draft reads each token once


def test_near_models_agree_more_often_than_chance() -> None:
    """One random number for both: more draws agree than independent ones would."""
    sampling = Sampling(temperature=1.0, max_tokens=100, logit_bias=((256, -99.0),))
    it = engine(draft=Noisy(noise=0.03))
    model = it.runner.model
    assert isinstance(it.guesser, ModelGuesser)
    ((answer,),) = it.generate([Request((1, 2), sampling)])
    with torch.no_grad():
        text = torch.tensor([1, 2, *answer.tokens[:-1]])
        p, q = (
            m.logits(m(text)).log_softmax(-1)[1:].exp() for m in (model, it.guesser.runner.model)
        )
    chance = float((p * q).sum(-1).mean())
    assert it.accepted / it.guessed > 2 * chance


def test_drafts_that_cannot_guess_are_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="layers=2 is not fewer than the model's 2"):
        engine(draft=EarlyExit(layers=2))
    other = tiny_model()
    save_hf(other, tmp_path)
    shuffled = byte_tokenizer()
    vocab = shuffled.backend.get_vocab()
    swap = {"A": vocab["B"], "B": vocab["A"]}
    other_backend = Backend(models.BPE({**vocab, **swap}, []))
    Tokenizer(other_backend, special=shuffled.special).save(tmp_path)
    with pytest.raises(ConfigError, match="another vocabulary than the model"):
        engine(draft=DraftModel(model=str(tmp_path)))
    byte_tokenizer().save(tmp_path)
    it = engine(draft=DraftModel(model=str(tmp_path)))
    it.generate([Request((1, 2), Sampling(temperature=0.0, max_tokens=20))])
    assert it.accepted == it.guessed > 0


def test_guesses_follow_the_longest_and_latest_match() -> None:
    assert NGram(tokens=2).after([1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3]) == [[9, 9]]
    assert NGram(tokens=2, longest=2).after([1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3]) == [[7, 1]]
    assert NGram().after([1, 2, 3, 4]) == []
    assert NGram(reach=3).after([1, 2, 3, 1, 2]) == []


def test_branches_are_distinct_continuations() -> None:
    text = [1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3]
    assert NGram(tokens=2, branches=3).after(text) == [[9, 9], [7, 1]]
    assert NGram(tokens=1, branches=2, shortest=1, longest=1).after([5, 6, 5, 7, 5]) == [[7], [6]]
    assert NGram(tokens=2, branches=4).after([4, 4, 4, 4]) == [[4], [4, 4]]
