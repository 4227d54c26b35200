"""Figures of speed on a clock that the test turns itself; numpy's percentiles are the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.evals.speed import Spread, Timeline, Workload, measure, percentile, prompt, speed
from treadle.inference.engine import Engine, EngineConfig


def timelines(seed: int, count: int) -> list[Timeline]:
    """Answers with random times, one token at a time."""
    generator = np.random.default_rng(seed)
    answers = []
    for _ in range(count):
        asked = float(generator.random())
        times = asked + np.cumsum(generator.random(int(generator.integers(2, 9))))
        answers.append(Timeline(10, asked, [(float(t), 1) for t in times]))
    return answers


def test_figures_are_those_of_numpy() -> None:
    rounds = [timelines(seed, 5) for seed in range(4)]
    found = speed(rounds)
    answers = [answer for answers in rounds for answer in answers]
    waits = [a.arrivals[0][0] - a.asked for a in answers]
    gaps = np.concatenate([np.diff([t for t, _ in a.arrivals]) for a in answers])
    shares = (50, 95, 99)
    assert [*vars(found.first_token).values()] == pytest.approx([*np.percentile(waits, shares)])
    assert found.between_tokens is not None
    assert [*vars(found.between_tokens).values()] == pytest.approx([*np.percentile(gaps, shares)])
    assert (found.requests, found.tokens) == (20, sum(len(a.arrivals) for a in answers))
    prefills, decodes, throughputs = [], [], []
    for round_ in rounds:
        times = np.array([t for a in round_ for t, _ in a.arrivals])
        begin, ready = min(a.asked for a in round_), max(a.arrivals[0][0] for a in round_)
        prefills.append(50 / (ready - begin))
        decodes.append((times > ready).sum() / (times.max() - ready))
        throughputs.append(len(times) / (times.max() - begin))
    assert found.prefill == pytest.approx(np.median(prefills))
    assert found.decode == pytest.approx(np.median(decodes))
    assert found.throughput == pytest.approx(np.median(throughputs))


def test_worked_by_hand() -> None:
    """Two requests of 8 tokens at 0 s; first tokens at 1 s and 2 s, then one a second each."""
    one = Timeline(8, 0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    two = Timeline(8, 0.0, [(2.0, 1), (4.0, 2)])  # two tokens at once are two gaps of a second
    found = speed([[one, two]])
    assert found.first_token == Spread(1.5, 1.95, 1.99)
    assert found.between_tokens == Spread(1.0, 1.0, 1.0)
    assert found.prefill == 16 / 2.0
    assert found.decode == 4 / 2.0
    assert found.throughput == 7 / 4.0
    assert found.plain()["first_token"] == {"p50": 1.5, "p95": 1.95, "p99": 1.99}


def test_one_token_has_no_gaps() -> None:
    found = speed([[Timeline(3, 1.0, [(2.0, 1)])]])
    assert found.between_tokens is None
    assert found.decode is None
    assert found.plain()["between_tokens"] is None
    assert Spread.of([]) is None
    for values in ([3.0], [2.0, 1.0], [5.0, 1.0, 4.0]):
        for share in (0.0, 0.3, 0.5, 1.0):
            assert percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_an_answer_without_a_token_is_refused() -> None:
    for rounds in ([], [[]], [[Timeline(3, 1.0)]]):
        with pytest.raises(TreadleError, match="without a token"):
            speed(rounds)


def test_an_engine_on_a_clock_that_ticks_once_a_step() -> None:
    """Prompts of 8 in one pass: the first tokens come with the first tick, one more with each."""
    engine = Engine(tiny_model(), byte_tokenizer(), EngineConfig(slots=4))
    clock = map(float, itertools.count()).__next__
    load = Workload(batch=3, prompt=8, output=5, rounds=2)
    rounds = measure(engine, load, clock)
    assert len(rounds) == 2
    for answers in rounds:
        assert [a.tokens for a in answers] == [5, 5, 5]
        for answer in answers:
            times = [t - answer.asked for t, _ in answer.arrivals]
            assert times == [1.0, 2.0, 3.0, 4.0, 5.0]
    found = speed(rounds)
    assert (found.prefill, found.decode, found.throughput) == (24.0, 3.0, 3.0)
    assert engine.prefilled == 3 * 3 * 8, "each round's prompts are new to the prefix cache"


def test_prompts_differ_and_are_the_same_again() -> None:
    load = Workload(prompt=16)
    several = {prompt(load, number, row, 100) for number in range(3) for row in range(3)}
    assert len(several) == 9
    assert prompt(load, 1, 2, 100) == prompt(load, 1, 2, 100)
    assert all(0 <= token < 100 for tokens in several for token in tokens)


def test_what_does_not_fit_is_refused() -> None:
    engine = Engine(tiny_model(), byte_tokenizer())
    with pytest.raises(TreadleError, match="129 tokens, but the model's context is 128"):
        measure(engine, Workload(prompt=100, output=29), lambda: 0.0)
    clock = map(float, itertools.count()).__next__
    (answers,) = measure(engine, Workload(prompt=100, output=28, rounds=1), clock)
    assert answers[0].tokens == 28
