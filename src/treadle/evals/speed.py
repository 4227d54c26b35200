"""How fast answers come: time to first token, gaps between tokens, tokens a second.

    t_0 asked, t_1 <= ... <= t_n the times of an answer's tokens
    first token   t_1 - t_0                                      seconds
    gaps          t_i - t_(i-1), i = 2 .. n                      seconds
    prefill       prompt tokens / (max t_1 - min t_0)            over the requests of a round
    decode        tokens after T / (max t_n - T), T = max t_1    when no prompt is read any more
    throughput    all tokens / (max t_n - min t_0)

Tokens that came together share the time since those before: k of them are k equal gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling, uniform

CARD = Card(
    id="ev.speed",
    paper="No paper: engineering. The percentiles interpolate as type 7 of Hyndman and Fan 1996.",
    summary="Time to first token, gaps between tokens, tokens a second; of a model or a server.",
    recipe="treadle bench smollm2-135m-instruct --batch 4 --prompt 64 --output 32",
    oracle="tests/evals/test_evals_speed.py::test_figures_are_those_of_numpy",
)
Clock = Callable[[], float]


class Workload(Config):
    """Requests alike: so many together, so long, so often."""

    batch: int = Field(1, ge=1)
    """Requests at once."""
    prompt: int = Field(128, ge=1)
    """Tokens that each reads."""
    output: int = Field(64, ge=1)
    """Tokens that each writes."""
    rounds: int = Field(3, ge=1)
    """How often; one more comes before them that does not count."""
    seed: int = 0


@dataclass
class Timeline:
    """One answer: when it was asked for, and when its tokens came."""

    prompt: int
    """Tokens read."""
    asked: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Times, and the tokens that came then."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]

    def gaps(self) -> Iterator[float]:
        """Seconds between tokens; those of the first arrival have none before them."""
        before = self.first
        for time, count in self.arrivals[1:]:
            yield from [(time - before) / count] * count
            before = time


@dataclass(frozen=True)
class Spread:
    """Percentiles of some seconds."""

    p50: float
    p95: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        if not values:
            return None
        return Spread(*(percentile(values, share) for share in (0.5, 0.95, 0.99)))


@dataclass(frozen=True)
class Speed:
    """Figures over all rounds; rates are medians of the rounds'."""

    requests: int
    tokens: int
    """Generated."""
    first_token: Spread
    between_tokens: Spread | None
    """None where an answer is one token."""
    prefill: float
    """Prompt tokens a second."""
    decode: float | None
    """Tokens a second while all decode; None where nothing came after the last first token."""
    throughput: float
    """Generated tokens a second, reading of prompts included."""

    def plain(self) -> dict[str, Any]:
        between = self.between_tokens
        return {
            **vars(self),
            "first_token": vars(self.first_token),
            "between_tokens": None if between is None else vars(between),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def speed(rounds: Sequence[Sequence[Timeline]]) -> Speed:
    """Figures of rounds of answers.

    Raises:
        TreadleError: an answer has no token.
    """
    answers = [answer for answers in rounds for answer in answers]
    if not answers or not all(answer.arrivals for answer in answers):
        raise TreadleError("nothing to measure: an answer came without a token")
    first = Spread.of([answer.first - answer.asked for answer in answers])
    assert first is not None
    decodes = [rate for rate in map(_decode, rounds) if rate is not None]
    return Speed(
        requests=len(answers),
        tokens=sum(answer.tokens for answer in answers),
        first_token=first,
        between_tokens=Spread.of([gap for answer in answers for gap in answer.gaps()]),
        prefill=percentile([_prefill(r) for r in rounds], 0.5),
        decode=percentile(decodes, 0.5) if decodes else None,
        throughput=percentile([_throughput(r) for r in rounds], 0.5),
    )


def _prefill(answers: Sequence[Timeline]) -> float:
    seconds = max(a.first for a in answers) - min(a.asked for a in answers)
    return sum(a.prompt for a in answers) / seconds


def _decode(answers: Sequence[Timeline]) -> float | None:
    start, end = max(a.first for a in answers), max(a.last for a in answers)
    tokens = sum(count for a in answers for time, count in a.arrivals if time > start)
    return tokens / (end - start) if tokens else None


def _throughput(answers: Sequence[Timeline]) -> float:
    seconds = max(a.last for a in answers) - min(a.asked for a in answers)
    return sum(a.tokens for a in answers) / seconds


def measure(engine: Engine, load: Workload, clock: Clock) -> list[list[Timeline]]:
    """Rounds of an engine under a load, after one that warms it up.

    Raises:
        TreadleError: prompt and answer do not fit the model's context.
    """
    if load.prompt + load.output > engine.runner.context:
        raise TreadleError(
            f"prompt and output have {load.prompt + load.output} tokens, but the model's context "
            f"is {engine.runner.context}: lower --prompt or --output"
        )
    return [_round(engine, load, number, clock) for number in range(load.rounds + 1)][1:]


def _round(engine: Engine, load: Workload, number: int, clock: Clock) -> list[Timeline]:
    sampling = Sampling(temperature=0.0, max_tokens=load.output, min_tokens=load.output)
    begin = clock()
    answers: dict[int, Timeline] = {}
    for row in range(load.batch):
        tokens = prompt(load, number, row, engine.runner.vocab)
        answers[engine.submit(Request(tokens, sampling))] = Timeline(load.prompt, begin)
    seen, going = dict.fromkeys(answers, 0), set(answers)
    while going:
        touched, now = engine.step(), clock()
        for sequence in touched:
            fresh = len(sequence.tokens) - seen[sequence.job]
            if fresh:
                answers[sequence.job].arrivals.append((now, fresh))
                seen[sequence.job] += fresh
            if sequence.finish is not None:
                going.discard(sequence.job)
    return list(answers.values())


def prompt(load: Workload, number: int, row: int, vocab: int) -> tuple[int, ...]:
    """Random tokens, others in each round and row, so that no prefix is known already."""
    places = range(load.prompt)
    same = [[word] * load.prompt for word in (load.seed, number, row)]
    return tuple(int(u * vocab) for u in uniform(*same, places))
