"""How a model does in an environment: plays that are watched and not learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field

from treadle.alignment.episodes import Episode
from treadle.alignment.played import Played, played_metrics
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure, Sample, accuracy, write_samples
from treadle.data.source import Env
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision


class MeasurePlayed(Step):
    """Let a model play, and write down every word."""

    model: ModelSource
    subject: str
    played: Played
    """Its environment, sampling, turns and patience count; a lot is as large as a step's."""
    what: str = "reward"
    """Name of the result: the mean reward of a seat, in [0, 1]."""
    count: int = Field(64, ge=1)
    """Problems, each played once."""
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model, precision = opened.model.eval().requires_grad_(False), self.precision.resolve("cpu")
        precision.prepare(model)
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            autocast=partial(precision.autocast, "cpu"),
            workspace=workspace,
        )
        table, lot = self.played.table(env), self.played.prompts * self.played.completions
        episodes: list[Episode] = []
        with workspace.progress.task(self.name, self.count) as task:
            for first in range(0, self.count, lot):
                end = min(first + lot, self.count)
                episodes += table.play(range(first, end), copies=1, seed=0)
                task.update(end)
        if not episodes:
            raise TreadleError(f"none of {self.count} openings fits the model's context")
        for failure, times in Counter(f for e in episodes for f in e.failures).most_common(8):
            env.say(f"environment: {failure} ({times} times)")
        rewards = [seat.reward for e in episodes for seat in e.seats]
        results: dict[str, Figure] = {self.what: accuracy(rewards)}
        write_samples(workspace.folder, [_sample(self.what, e) for e in episodes])
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": opened.bytes_on_disk,
            "problems_left_out": self.count - len(episodes),
            **{k: v for k, v in played_metrics(episodes).items() if k != "reward"},
        }


def _sample(what: str, episode: Episode) -> Sample:
    """What the first seat heard and said, and the mean reward of all seats."""
    first = episode.seats[0]
    said = [f"{m.role}: {m.content}" for m in first.messages]
    opening = next(i for i, m in enumerate(first.messages) if m.role == "assistant")
    return {
        "problem": f"{what}-{episode.number}",
        "task": what,
        "prompt": "\n".join(said[:opening]),
        "answer": "\n".join(said[opening:]),
        "expected": "",
        "score": sum(s.reward for s in episode.seats) / len(episode.seats),
    }
