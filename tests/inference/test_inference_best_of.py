"""Best-of: against all continuations that were drawn, one by one."""

from __future__ import annotations

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.best_of import BestOf, likelihood
from treadle.inference.engine import Engine
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling


def test_the_likeliest_of_all_that_are_drawn() -> None:
    engine = Engine(tiny_model(), byte_tokenizer())
    request = Request((1, 2, 3), Sampling(seed=4, max_tokens=12), n=3)
    (every,) = engine.generate([Request(request.prompt, request.sampling, n=9)])
    means = {c: sum(c.logprobs) / len(c.tokens) for c in every}
    found = BestOf(of=9)(engine, request)
    assert list(found) == sorted(every, key=means.__getitem__)[:-4:-1]
    lengths = {len(c.tokens) for c in every}
    assert len(lengths) > 1, "else the sum would do"
    assert BestOf(of=3)(engine, request) != list(every[:3])


def test_fewer_than_are_told_is_refused() -> None:
    engine = Engine(tiny_model(), byte_tokenizer())
    with pytest.raises(TreadleError, match=r"best of 2, but n=3"):
        BestOf(of=2)(engine, Request((1,), Sampling(), n=3))


def test_an_empty_text_is_last() -> None:
    assert likelihood(Completion((), "", (), "cancelled")) == float("-inf")
