"""Speculation changes the number of passes and nothing else."""

from __future__ import annotations

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.speculative import NGram
from treadle.inference.torch_runner import TorchRunner

# Few tokens in turn and no end: texts that repeat themselves.
REPETITIVE = ((256, -99.0), *((t, 9.0) for t in (3, 4, 5)))


def engine(*windows: int | None, pages: int = 200, draft: NGram | None = None) -> Engine:
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
def test_text_is_that_of_plain_decoding(windows, pages: int, sampling) -> None:
    """Greedy and sampled: every seed's text is the same, so the distribution is."""
    asked = requests(**sampling)
    plain = engine(*windows).generate(asked)
    it = engine(*windows, pages=pages, draft=NGram(shortest=1))
    found = it.generate(asked)
    assert it.accepted > 5
    for mine, theirs in zip(found, plain, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert it.scheduler.blocks.available == pages
    assert not any(it.scheduler.blocks.references)


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


def test_guesses_follow_the_longest_and_latest_match() -> None:
    assert NGram(tokens=2)([1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3]) == [9, 9]
    assert NGram(tokens=2, longest=2)([1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3]) == [7, 1]
    assert NGram()([1, 2, 3, 4]) == []
    assert NGram(reach=3)([1, 2, 3, 1, 2]) == []
