"""How a model does in an environment: plays that are watched and not learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from pydantic import Field

from treadle.alignment.episodes import Episode
from treadle.alignment.played import Played, played_metrics
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure, Sample, accuracy, write_samples
from treadle.data.source import Env
from treadle.models.source import ModelSource, Opened
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision


class MeasurePlayed(Step):
    """Let a model play, and write down every word."""

    model: ModelSource
    subject: str
    played: Played
    """Its environment, sampling, sampler, turns and patience count; a lot is as large as a
    step's."""
    opponent: ModelSource | None = None
    """Has all seats but one; without, the model plays with itself, which cannot tell whether it
    became the better player."""
    what: str = "reward"
    """Name of the result: the mean reward of the model's seats, in [0, 1], over plays."""
    count: int = Field(64, ge=1)
    """Problems, each played once; against an opponent, once from every seat."""
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        table, copies = self.played.table(self._env(opened, workspace)), 1
        if self.opponent is not None:
            other = self._env(self.opponent.open(workspace), workspace)
            table = replace(table, opponent=self.played.speaker(other))
            copies = len(self.played.environment.openings(0))
            if copies == 1:
                raise TreadleError(f"{self.name}: the environment has one seat: no `opponent` sits")
        episodes: list[Episode] = []
        lot = max(1, self.played.prompts * self.played.completions // copies)
        with workspace.progress.task(self.name, self.count) as task:
            for first in range(0, self.count, lot):
                end = min(first + lot, self.count)
                episodes += table.play(range(first, end), copies, seed=0)
                task.update(end)
        if not episodes:
            raise TreadleError(f"none of {self.count} openings fits the model's context")
        for failure, times in Counter(f for e in episodes for f in e.failures).most_common(8):
            workspace.progress.say(f"environment: {failure} ({times} times)")
        results: dict[str, Figure] = {self.what: accuracy([self._reward(e) for e in episodes])}
        if self.opponent is not None:
            others = [[s.reward for i, s in enumerate(e.seats) if i != e.place] for e in episodes]
            results[f"{self.what}: the opponent's"] = accuracy(list(map(fmean, others)))
        write_samples(workspace.folder, [self._sample(e) for e in episodes])
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": opened.bytes_on_disk,
            "problems_left_out": self.count - len({e.number for e in episodes}),
            **{k: v for k, v in played_metrics(episodes).items() if k != "reward"},
        }

    def _env(self, opened: Opened, workspace: Workspace) -> Env:
        model, precision = opened.model.eval().requires_grad_(False), self.precision.resolve("cpu")
        precision.prepare(model)
        return Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            autocast=partial(precision.autocast, "cpu"),
            workspace=workspace,
        )

    def _reward(self, episode: Episode) -> float:
        """The mean over the model's seats, which win and lose together: a play counts once."""
        if self.opponent is not None:
            return episode.seats[episode.place].reward
        return fmean(seat.reward for seat in episode.seats)

    def _sample(self, episode: Episode) -> Sample:
        """What the model's first seat heard and said, and its reward."""
        against = self.opponent is not None
        seat = episode.seats[episode.place if against else 0]
        said = [f"{m.role}: {m.content}" for m in seat.messages]
        spoke = (i for i, m in enumerate(seat.messages) if m.role == "assistant")
        opening = next(spoke, len(said))
        return {
            "problem": f"{self.what}-{episode.number}" + f"-seat-{episode.place}" * against,
            "task": self.what,
            "prompt": "\n".join(said[:opening]),
            "answer": "\n".join(said[opening:]),
            "expected": "",
            "score": self._reward(episode),
        }
