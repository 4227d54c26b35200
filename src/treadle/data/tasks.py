"""Multi-task training: how often each task comes, and batches that know their task.

    p_i = min(n_i, limit)^(1/T) / sum_j min(n_j, limit)^(1/T)

T = 1 is in proportion to the number of examples, a large T makes all tasks equal; the limit keeps
a huge task from drowning the others. Raffel et al. 2020, arXiv:1910.10683, section 3.5.2;
Arivazhagan et al. 2019, arXiv:1907.05019. Each step draws some tasks and takes their data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.data.batch import Batch
from treadle.data.source import Env, Limit, Source, Stream, Work

CARD = Card(
    id="ft.multitask",
    paper="Raffel et al. 2020, T5, arXiv:1910.10683; Arivazhagan et al. 2019, arXiv:1907.05019",
    summary="Several tasks in one run, drawn in proportion to their size at a temperature.",
    recipe="treadle run multi-task",
    oracle="tests/data/test_data_tasks.py::test_shares_are_those_of_the_formula",
)


class Task(Config):
    """One of the tasks of a mixture."""

    name: str = Field(min_length=1)
    source: Source
    """Gives a draw's worth of data at each of its steps."""
    examples: int = Field(1, ge=1)
    """n_i."""


class TaskMix(Source):
    """Several tasks; each batch says by `task` which it is of."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    draws: int = Field(2, ge=1)
    """Tasks that are drawn, with replacement, in a step."""
    temperature: float = Field(1.0, gt=0.0)
    """T."""
    limit: int = Field(2**31, ge=1)
    """Examples that a task counts for at most."""

    def open(self, env: Env) -> TaskMixStream:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"TaskMix: two tasks have one name in {names}; rename one")
        return TaskMixStream(self, env)

    def shares(self) -> tuple[float, ...]:
        """p, which sums to 1."""
        sizes = [min(t.examples, self.limit) for t in self.tasks]
        powers = [(size / max(sizes)) ** (1 / self.temperature) for size in sizes]
        return tuple(power / sum(powers) for power in powers)


class TaskMixStream(Stream):
    """Its state is the step, how often each task was drawn, and the place in each."""

    def __init__(self, config: TaskMix, env: Env) -> None:
        self.config, self.seed = config, env.seed
        self.shares = config.shares()
        self.drawn = [0] * len(config.tasks)
        # One task may be drawn each time.
        most = None if env.steps is None else env.steps * config.draws
        inner = replace(env, steps=most)
        self.inner = [task.source.open(within(inner, task.name)) for task in config.tasks]

    def __next__(self) -> Work:
        step = sum(self.drawn) // self.config.draws
        random = np.random.default_rng([self.seed, step])  # the same tasks on every rank
        chosen = random.choice(len(self.inner), size=self.config.draws, p=self.shares)
        batches: list[Batch] = []
        metrics: dict[str, float] = {}
        limits: dict[Limit, None] = {}
        for place in map(int, chosen):
            work = next(self.inner[place])
            self.drawn[place] += 1
            batches += [replace(batch, task=place) for batch in work.batches]
            names = {key: f"{self.config.tasks[place].name}.{key}" for key in work.metrics}
            metrics |= {names[key]: value for key, value in work.metrics.items()}
            limits |= {replace(x, metric=names.get(x.metric, x.metric)): None for x in work.limits}
        for task, count in zip(self.config.tasks, self.drawn, strict=True):
            metrics[f"{task.name}.share"] = count / sum(self.drawn)
        return Work(tuple(batches), metrics, tuple(limits))

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn.copy(), "inner": [stream.state() for stream in self.inner]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn = [int(count) for count in state["drawn"]]
        for stream, place in zip(self.inner, state["inner"], strict=True):
            stream.restore(place)


def within(env: Env, name: str) -> Env:
    """An environment with a folder of its own for one of several sources."""
    scratch = env.scratch / name
    scratch.mkdir(parents=True, exist_ok=True)
    return replace(env, scratch=scratch)
