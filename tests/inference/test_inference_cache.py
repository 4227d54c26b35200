"""Cached generation equals the model run anew on the whole text at every token."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model, variants

from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.runner import Batch
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner

PROMPTS = [3, 17, 5, 31, 2, 9, 26, 4]


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_cached_equals_uncached(name, model) -> None:
    """Prompts and answers of unequal length, fewer slots than requests."""
    torch.manual_seed(2)
    prompts = [tuple(torch.randint(0, 256, (n,)).tolist()) for n in PROMPTS]
    engine = Engine(model, byte_tokenizer(), EngineConfig(slots=3, prefill_tokens=40))
    requests = [
        Request(p, Sampling(temperature=0.0, max_tokens=5 + 3 * i)) for i, p in enumerate(prompts)
    ]
    answers = engine.generate(requests)
    for request, (completion,) in zip(requests, answers, strict=True):
        text = list(request.prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            with torch.no_grad():
                expected = model.logits(model(torch.tensor(text)))[-1].log_softmax(-1)
            assert token == expected.argmax()
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            text.append(token)


def test_a_window_keeps_a_ring() -> None:
    runner = TorchRunner(tiny_model(6, None), pages=8)
    table = [0, 1, 2]
    runner.run(Batch(list(range(40)), [40], [0], [table], [1]))
    for start in range(40, 45):
        runner.run(Batch([1], [1], [start], [table], [1]))
    assert runner.memory.rows.keys[0].shape[2] == 6
    assert runner.memory.rows.keys[1].shape[2] >= 45
    held = runner.memory.rows.held(torch.tensor([45]), 45, 6)
    assert sorted(held[0].tolist()) == list(range(39, 45))


def test_precision_may_change_between_generations() -> None:
    """An engine lives on while its model is cast, as in a run that turns to bf16."""
    model = tiny_model()
    engine = Engine(model, byte_tokenizer())
    request = Request((1, 2, 3), Sampling(temperature=0.0, max_tokens=6))
    engine.generate([request])
    model.to(torch.bfloat16)
    engine.forget()
    low = Engine(model, byte_tokenizer()).generate([request])
    assert engine.generate([request]) == low
