"""Log-probabilities of prompts: the model's own, however the prompt was cut, crowded or known."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Completion, Request
from treadle.inference.rolling import Rolling
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner

PROMPTS = [tuple((7 * i + 3 * j) % 256 for j in range(n)) for i, n in enumerate((1, 2, 9, 33, 20))]


def engine(pages: int = 200, **limits) -> Engine:
    runner = TorchRunner(tiny_model(), pages=pages, page=4)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(**limits))


def check(it: Engine, prompt: tuple[int, ...], answer: Completion, top: int) -> None:
    with torch.no_grad():
        logp = it.runner.model.logits(it.runner.model(torch.tensor(prompt))).log_softmax(-1)
    assert len(answer.prompt) == len(prompt) - 1
    for row, token, reading in zip(logp, prompt[1:], answer.prompt, strict=False):
        assert reading.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(top)
        assert [t for t, _ in reading.top] == best.indices.tolist()
        assert [p for _, p in reading.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("limits", [{}, {"prefill_tokens": 7}, {"pages": 18}], ids=str)
def test_readings_are_the_models(limits) -> None:
    """With penalties, other temperatures and known beginnings, which must not matter."""
    it = engine(**limits)
    plain = [Request(p, Sampling(max_tokens=9, seed=3)) for p in PROMPTS]
    expected = [c[0].tokens for c in it.generate(plain)]
    asked = [
        Request(p, Sampling(max_tokens=9, seed=3), n=1 + i % 2, prompt_logprobs=i)
        for i, p in enumerate(PROMPTS)
    ]
    for i, answers in enumerate(it.generate(asked)):
        assert answers[0].tokens == expected[i]
        for answer in answers:
            check(it, PROMPTS[i], answer, i)
    sampling = Sampling(max_tokens=2, temperature=0.3, repetition_penalty=1.9)
    ((answer,),) = it.generate([Request(PROMPTS[3], sampling, prompt_logprobs=2)])
    check(it, PROMPTS[3], answer, 2)
    blocks = it.scheduler.blocks
    assert blocks.available == blocks.pages


def test_long_prompts_are_read_in_pieces() -> None:
    model = tiny_model(context=700)
    it = Engine(model, byte_tokenizer())
    prompt = tuple(i * i % 251 for i in range(600))
    wanted = []
    run = it.runner.run
    it.runner.run = lambda batch: (wanted.append(batch.outputs), run(batch))[1]
    ((answer,),) = it.generate([Request(prompt, Sampling(max_tokens=1), prompt_logprobs=1)])
    check(it, prompt, answer, 1)
    assert wanted == [[256], [256], [88]]


def test_what_cannot_be_read_is_refused() -> None:
    request = Request((1, 2), Sampling(), prompt_logprobs=258)
    with pytest.raises(TreadleError, match=r"prompt_logprobs=258.*vocabulary of 257"):
        engine().submit(request)
    it = Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache=Rolling()))
    with pytest.raises(TreadleError, match="keeps whole prompts"):
        it.submit(Request((1, 2), Sampling(), prompt_logprobs=0))
