"""Passes over static tensors, compiled or recorded, equal the model itself."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, variants

from treadle.inference.advance import Ready
from treadle.inference.cuda_graphs import Recorder
from treadle.inference.decode import Eager, recorded
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.paged_memory import PagesOnly
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling

PROMPTS = [3, 17, 5, 31, 2, 9, 26, 4]


class Replays(Recorder):
    """What CUDA graphs do, without a GPU: the function runs on what its tensors hold by then."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Ready) -> Ready:
        self.recorded += 1
        result = torch.empty_like(run())
        return lambda: result.copy_(run())


def requests() -> list[Request]:
    torch.manual_seed(2)
    prompts = [tuple(torch.randint(0, 256, (n,)).tolist()) for n in PROMPTS]
    return [
        Request(p, Sampling(temperature=0.0, max_tokens=5 + 3 * i)) for i, p in enumerate(prompts)
    ]


def check_against_model(model, given: list[Request], answers) -> None:
    for request, (completion,) in zip(given, answers, strict=True):
        text = list(request.prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            with torch.no_grad():
                expected = model.logits(model(torch.tensor(text)))[-1].log_softmax(-1)
            assert token == expected.argmax()
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            text.append(token)


def on_graphs(model, recorder: Recorder, over=Eager(), config=EngineConfig(slots=3)) -> Engine:
    engine = Engine(model, byte_tokenizer(), config.replace(cache=config.cache or PagesOnly()))
    runner = engine.runner
    runner.advance = recorded(model, runner.memory, runner.autocast, recorder, over)
    return engine


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_pages_alone_equal_uncached(name, model) -> None:
    engine = Engine(model, byte_tokenizer(), EngineConfig(slots=3, cache=PagesOnly()))
    check_against_model(model, requests(), engine.generate(requests()))
    assert engine.runner.memory.rows is None


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_recorded_equals_the_model_itself(name, model) -> None:
    recorder = Replays()
    engine = on_graphs(model, recorder)
    check_against_model(model, requests(), engine.generate(requests()))
    assert recorder.recorded == len(engine.runner.advance.frames) >= 3
    check_against_model(model, requests(), engine.generate(requests()))
    assert recorder.recorded == len(engine.runner.advance.frames)
