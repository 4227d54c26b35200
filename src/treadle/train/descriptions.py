"""A source whose batches carry the description of their task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from pydantic import Field

from treadle.core.errors import ConfigError
from treadle.data.batch import Batch
from treadle.data.source import Env, Source, Stream, Work
from treadle.data.tasks import TaskMix
from treadle.objectives.described import DescribedBatch


class WithDescriptions(Source):
    """A mixture of tasks, each with some words on what it is."""

    source: TaskMix
    descriptions: tuple[str, ...] = Field(min_length=1)
    """One for each task, in their order."""

    def open(self, env: Env) -> Stream:
        """The stream from its beginning.

        Raises:
            ConfigError: another number of descriptions than of tasks, or an empty one.
        """
        tasks = len(self.source.tasks)
        if len(self.descriptions) != tasks or not all(map(str.strip, self.descriptions)):
            raise ConfigError(
                f"WithDescriptions: {len(self.descriptions)} descriptions for {tasks} tasks, and "
                "none may be empty; give one each"
            )
        return DescribedStream(self, env)


class DescribedStream(Stream):
    """Its state is that of the source within."""

    def __init__(self, config: WithDescriptions, env: Env) -> None:
        self.inner = config.source.open(env)
        self.descriptions = [
            torch.tensor(env.tokenizer.encode(words, parse_special=False))
            for words in config.descriptions
        ]

    def __next__(self) -> Work:
        work = next(self.inner)
        return replace(work, batches=tuple(map(self._described, work.batches)))

    def _described(self, batch: Batch) -> DescribedBatch:
        known = {f.name: getattr(batch, f.name) for f in fields(Batch)}
        return DescribedBatch(**known, description=self.descriptions[batch.task])

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.inner.restore(state)
