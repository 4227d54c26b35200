"""Whatever the traffic, every request gets the text that it gets alone, and all pages come back."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.constraint import Constraint
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.runner import Batch
from treadle.inference.sampling import Sampling
from treadle.inference.scheduler import QueueFullError
from treadle.inference.torch_runner import TorchRunner


def engine(pages: int = 200, page: int = 4, **limits) -> Engine:
    runner = TorchRunner(tiny_model(), pages=pages, page=page)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(**limits))


def requests(count: int, seed: int = 0) -> list[Request]:
    dice = random.Random(seed)
    return [
        Request(
            tuple(dice.randrange(256) for _ in range(dice.randint(1, 40))),
            Sampling(seed=i, max_tokens=dice.randint(1, 20)),
            n=dice.choice((1, 1, 3)),
            priority=dice.choice((0, 0, 5)),
        )
        for i, _ in enumerate(range(count))
    ]


def alone(request: Request) -> list[tuple[int, ...]]:
    return [c.tokens for c in engine().generate([request])[0]]


def all_free(it: Engine) -> bool:
    blocks = it.scheduler.blocks
    return blocks.available == blocks.pages and not any(blocks.references)


@pytest.mark.parametrize(
    "limits",
    [{}, {"prefill_tokens": 7}, {"slots": 3}, {"pages": 20}, {"pages": 16, "prefill_tokens": 9}],
    ids=str,
)
def test_random_traffic(limits) -> None:
    """Crowded, chunked and preempted, against each request alone."""
    asked = requests(24)
    it = engine(**limits)
    found = it.generate(asked)
    for request, completions in zip(asked, found, strict=True):
        assert [c.tokens for c in completions] == alone(request)
    assert all_free(it)
    assert (it.scheduler.preemptions > 0) == ("pages" in limits)


def test_submit_and_cancel_at_random_leave_no_page_behind() -> None:
    dice = random.Random(3)
    it = engine(pages=24, slots=6, prefill_tokens=11)
    asked, jobs, ended = requests(40, seed=1), {}, {}
    while asked or it.running or it.waiting:
        if asked and dice.random() < 0.4:
            request = asked.pop()
            jobs[it.submit(request)] = request
        if jobs and dice.random() < 0.15:
            it.cancel(dice.choice(list(jobs)))
        for sequence in it.step():
            if sequence.finish is not None:
                key = sequence.job, sequence.index
                assert key not in ended
                ended[key] = sequence.completion()
    assert len(ended) == sum(r.n for r in jobs.values())
    assert all_free(it)
    cancelled = [key for key, c in ended.items() if c.finish == "cancelled"]
    assert 0 < len(cancelled) < len(ended)
    for (job, index), completion in ended.items():
        expected = alone(jobs[job])[index]
        assert completion.tokens == expected[: len(completion.tokens)]
        if completion.finish != "cancelled":
            assert completion.tokens == expected


def test_completions_of_one_request_equal_separate_streams() -> None:
    """n=k shares prompt pages; each completion is the one that a request of its own would get."""
    prompt = tuple(range(30, 41))
    it = engine()
    it.submit(Request(prompt, Sampling(seed=2, max_tokens=6), n=4))
    it.step()
    tables = [s.table for s in it.running]
    assert all(t[:2] == tables[0][:2] for t in tables)
    assert it.scheduler.blocks.references[tables[0][0]] == 4
    found = {s.index: s for _ in range(6) for s in it.step()}
    model = it.runner.model
    for sequence in found.values():
        text = torch.tensor([*prompt, *sequence.tokens])
        with torch.no_grad():
            logp = model.logits(model(text)).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(-1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, atol=1e-4, rtol=0)
    assert len({tuple(s.tokens) for s in found.values()}) > 1
    assert all_free(it)


def test_chunks_share_passes_with_decoding() -> None:
    """A long prompt does not hold up a text under way."""
    it = engine(prefill_tokens=8)
    passes: list[Batch] = []
    run = it.runner.run
    it.runner.run = lambda batch: (passes.append(batch), run(batch))[1]
    it.submit(Request((1, 2), Sampling(max_tokens=30, logit_bias=((256, -99.0),))))
    it.step()
    it.submit(Request(tuple(range(40)), Sampling(max_tokens=2)))
    for _ in range(5):
        it.step()
    assert [b.counts for b in passes[1:6]] == [[1, 8]] * 5
    assert [b.outputs for b in passes[1:6]] == [[1, 0]] * 4 + [[1, 1]]


def test_priority_goes_first_and_is_preempted_last() -> None:
    it = engine(slots=1)
    for priority in (0, 0, 7):
        it.submit(Request((1, 2, 3), Sampling(max_tokens=2), priority=priority))
    order = []
    while it.running or it.waiting:
        order += [s.job for s in it.step() if s.finish is not None]
    assert order == [2, 0, 1]
    it = engine(pages=8)
    plain = it.submit(Request(tuple(range(9)), Sampling(max_tokens=20), priority=0))
    urgent = it.submit(Request(tuple(range(9)), Sampling(max_tokens=20), priority=1))
    while not it.scheduler.preemptions:
        it.step()
    assert [s.job for s in it.running] == [urgent]
    assert [s.job for s in it.waiting] == [plain]


def test_a_full_queue_refuses_and_generate_waits_for_room() -> None:
    it = engine(slots=1, queue=2)
    asked = requests(6)[:]
    singles = [Request(r.prompt, r.sampling) for r in asked]
    assert [c[0].tokens for c in it.generate(singles)] == [alone(r)[0] for r in singles]
    it.submit(singles[0])
    it.submit(singles[1])
    with pytest.raises(QueueFullError, match=r"2 requests wait.*queue.*try again"):
        it.submit(singles[2])


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(TreadleError, match=r"may take 50 tokens.*holds 40.*cache_tokens"):
        engine(pages=10).submit(Request(tuple(range(30)), Sampling(max_tokens=20)))


def test_a_cancelled_request_that_waits_comes_out_too() -> None:
    it = engine(slots=2)
    it.submit(Request((1,), Sampling(max_tokens=9)))
    job = it.submit(Request((2,), Sampling(), n=2))
    it.step()
    it.cancel(job)
    gone = [(s.job, s.index, s.finish) for s in it.step() if s.finish is not None]
    assert gone == [(job, 0, "cancelled"), (job, 1, "cancelled")]
    assert it.waiting == []


class Alternate(Constraint):
    """Even and odd tokens in turn."""

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn

    def fork(self) -> Alternate:
        return Alternate(self.turn)

    def mask(self) -> torch.Tensor:
        return torch.arange(256) % 2 == self.turn

    def advance(self, token: int) -> None:
        assert token % 2 == self.turn
        self.turn = 1 - self.turn

    def done(self) -> bool:
        return False


@pytest.mark.parametrize("pages", [14, 200])
def test_constraints_hold_for_each_completion_also_when_preempted(pages: int) -> None:
    it = engine(pages=pages)
    asked = [
        Request((i, 3), Sampling(seed=i, max_tokens=17), n=3, constraint=Alternate())
        for i in range(3)
    ]
    for completions in it.generate(asked):
        for completion in completions:
            assert [t % 2 for t in completion.tokens] == [i % 2 for i in range(17)]
    assert (it.scheduler.preemptions > 0) == (pages == 14)


def test_min_tokens_and_likeliest_tokens() -> None:
    ends = ((256, 50.0),)
    sampling = Sampling(logit_bias=ends, max_tokens=9, min_tokens=4, top_logprobs=3)
    (completion,) = engine().generate([Request((5, 6), sampling)])[0]
    assert completion.finish == "stop"
    assert len(completion.tokens) == 5
    for token, logprob, top in zip(
        completion.tokens, completion.logprobs, completion.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert dict(top).get(token, logprob) == pytest.approx(logprob)
        assert [v for _, v in top] == sorted((v for _, v in top), reverse=True)
