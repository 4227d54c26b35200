"""Mixtures of tasks: shares beside the formula, batches that know their task, exact resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_env import ChatModel, Numbered, chat_env

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.batch import Batch
from treadle.data.source import Env, Limit, Source, Stream, Work
from treadle.data.supervised import Supervised
from treadle.data.tasks import Task, TaskMix
from treadle.distillation.taught import Taught
from treadle.train.descriptions import WithDescriptions


def supervised(word: str, per_step: int = 2) -> Supervised:
    return Supervised(conversations=Numbered(word=word), per_step=per_step)


def tasks(*sizes: int) -> tuple[Task, ...]:
    words = ("weave", "warp", "loom")
    return tuple(
        Task(name=w, source=supervised(w), examples=n) for w, n in zip(words, sizes, strict=False)
    )


def said(env: Env, batch: Batch) -> str:
    return env.tokenizer.decode(batch.tokens.tolist())


def test_shares_are_those_of_the_formula(tmp_path: Path) -> None:
    """Against numbers by hand, then against how often tasks are drawn."""
    plain = TaskMix(tasks=tasks(100, 400, 900))
    assert plain.shares() == pytest.approx((1 / 14, 4 / 14, 9 / 14))
    warm = plain.replace(temperature=2.0)
    assert warm.shares() == pytest.approx((10 / 60, 20 / 60, 30 / 60))
    limited = plain.replace(temperature=2.0, limit=100)
    assert limited.shares() == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    cold = plain.replace(temperature=0.005)  # 900^200 is more than a float holds
    assert cold.shares() == pytest.approx((0.0, 0.0, 1.0))
    stream = warm.replace(draws=4).open(chat_env(tmp_path))
    counts: Counter[int] = Counter()
    for _ in range(150):
        work = next(stream)
        assert len(work.batches) == 4
        counts.update(batch.task for batch in work.batches)
    for task, share in enumerate(warm.shares()):
        assert counts[task] / 600 == pytest.approx(share, abs=0.05)
        name = warm.tasks[task].name
        assert work.metrics[f"{name}.share"] == pytest.approx(counts[task] / 600)


def test_batches_are_those_of_their_task(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    mix = TaskMix(tasks=tasks(1, 1), draws=3)
    stream, alone = mix.open(env), [t.source.open(env) for t in mix.tasks]
    for _ in range(6):
        for batch in next(stream).batches:
            assert mix.tasks[batch.task].name in said(env, batch)
            assert said(env, batch) == said(env, next(alone[batch.task]).batches[0])


def test_it_resumes_and_is_shared_by_ranks(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    mix = TaskMix(tasks=tasks(3, 5, 2), draws=3)
    stream = mix.open(env)
    for _ in range(4):
        next(stream)
    state = stream.state()
    expected = [flat(next(stream)) for _ in range(3)]
    again = mix.open(env)
    again.restore(state)
    assert [flat(next(again)) for _ in range(3)] == expected
    halves = [mix.open(replace(env, rank=rank, world=2)) for rank in range(2)]
    whole = mix.open(env)
    for _ in range(3):
        a, b = (next(half) for half in halves)
        assert [x.task for x in a.batches] == [x.task for x in b.batches]
        together = [*documents(env, a), *documents(env, b)]
        assert Counter(together) == Counter(documents(env, next(whole)))


class Warned(Source):
    """Another source whose stream is watched."""

    source: Source

    def open(self, env: Env) -> Stream:
        return WarnedStream(self.source.open(env))


class WarnedStream(Stream):
    def __init__(self, inner: Stream) -> None:
        self.inner = inner

    def __next__(self) -> Work:
        limits = (Limit("drift", 1.0, "less"), Limit("loss", 9.0, "slower"))
        return replace(next(self.inner), metrics={"drift": 2.0}, limits=limits)

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.inner.restore(state)


def test_what_a_task_warns_of_is_heard(tmp_path: Path) -> None:
    """Under the name that the metric has among the others; the objective's keep theirs."""
    mix = TaskMix(tasks=(Task(name="weave", source=Warned(source=supervised("weave"))),), draws=1)
    described = WithDescriptions(source=mix, descriptions=("about cloth",))
    taught = Taught(source=mix, teacher=ChatModel(folder=str(tmp_path)))
    place = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()))
    env = replace(chat_env(tmp_path), workspace=place)
    for source in (mix, described, taught):
        work = next(source.open(env))
        assert work.metrics["weave.drift"] == 2.0
        assert [limit.metric for limit in work.limits] == ["weave.drift", "loss"]


def test_names_must_differ(tmp_path: Path) -> None:
    task = tasks(1)[0]
    with pytest.raises(ConfigError, match="two tasks have one name"):
        TaskMix(tasks=(task, task)).open(chat_env(tmp_path))


def flat(work: Work) -> list[tuple[int, list[int]]]:
    return [(batch.task, batch.tokens.tolist()) for batch in work.batches]


def documents(env: Env, work: Work) -> list[str]:
    return [
        env.tokenizer.decode(batch.tokens[start : start + length].tolist())
        for batch in work.batches
        for start, length in zip(batch.layout.starts, batch.layout.lengths, strict=True)
    ]
