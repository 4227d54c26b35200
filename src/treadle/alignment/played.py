"""The source of reinforcement over several turns: plays an environment and learns from rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from treadle.alignment.episodes import Environment, Episode, Seat, Speaker, Table
from treadle.alignment.on_policy import REDRAWS, TOLD, Answer, OnPolicy, answers_batch
from treadle.core.errors import TreadleError
from treadle.data.batch import within_budget
from treadle.data.source import Env, Stream, Work
from treadle.inference.sampling import Sampling
from treadle.nn.modes import evaluating
from treadle.objectives.policy import PolicyBatch
from treadle.train.parallel import talk


class Played(OnPolicy):
    """Groups of plays of an environment's problems by the model in training."""

    environment: Environment
    completions: int = Field(4, ge=2)
    """Plays of each problem."""
    sampling: Sampling = Sampling(max_tokens=64)
    """Of each utterance."""
    turns: int = Field(6, ge=1)
    """Utterances of a play at most, of all seats together."""

    def open(self, env: Env) -> PlayedStream:
        return PlayedStream(self, env)

    def table(self, env: Env) -> Table:
        """Where the model of `env` plays."""
        return Table(
            environment=self.environment,
            speaker=self.speaker(env),
            sampling=self.sampling,
            turns=self.turns,
            patience=self.patience,
        )

    def speaker(self, env: Env) -> Speaker:
        """The model of `env`, which may speak in as many plays at once as a step has."""
        sample = self.sampler.open(env, self.share(env) * self.completions)
        return Speaker(env.tokenizer, env.model.config.context, sample)


@dataclass(frozen=True)
class Lane:
    """One seat in all plays of one problem."""

    seats: tuple[Seat, ...]

    @property
    def rewards(self) -> list[float]:
        """One that never spoke stands at the mean of those that did: it moves no advantage."""
        spoke = [seat.reward for seat in self.seats if seat.logprobs]
        mean = sum(spoke) / len(spoke)
        return [seat.reward if seat.logprobs else mean for seat in self.seats]

    @property
    def size(self) -> int:
        return sum(len(seat.prompt) + len(seat.tokens) for seat in self.seats)


class PlayedStream(Stream):
    """Its state is how many problems have been drawn."""

    def __init__(self, config: Played, env: Env) -> None:
        self.config, self.env = config, env
        self.drawn, self.left_out = 0, 0
        self.told: set[str] = set()
        self.annotate = config.reference.open(env)
        self.table = config.table(env)

    def __next__(self) -> Work:
        for redraws in range(REDRAWS):
            episodes = self.roll()
            lanes = lanes_of(episodes, self.config.completions)
            rewards = torch.tensor([lane.rewards for lane in lanes])
            advantages = self.config.advantage(rewards)
            useful = [i for i, row in enumerate(advantages) if bool((row != 0).any())]
            # Processes stay in step: where one has a signal, the others add what they have.
            (signals,) = talk.summed(len(useful))
            if signals:
                batches = self._batches([lanes[i] for i in useful], advantages[useful])
                spare = None if batches else self._batches(lanes[:1], advantages[:1])[0]
                metrics = {
                    **played_metrics(episodes),
                    "reward_std": float(rewards.std(-1).mean()),
                    "groups_with_signal": len(useful) / len(lanes),
                    "redraws": float(redraws),
                    "problems_left_out": float(self.left_out),
                }
                return Work(batches, metrics, (self.config.limit(),), spare)
        raise TreadleError(
            f"all plays of a problem ended with equal rewards, {REDRAWS} times "
            f"{self.config.prompts} problems (mean {float(rewards.mean()):.2f}): choose easier or "
            "harder ones, raise the temperature, or train on worked plays first"
        )

    def roll(self) -> list[Episode]:
        """Plays of this rank's share of the next problems."""
        share = self.config.share(self.env)
        first = self.drawn + self.env.rank * share
        self.drawn += self.config.prompts
        with evaluating(self.env.model):
            episodes = self.table.play(
                range(first, first + share), self.config.completions, self.env.seed
            )
        self.left_out += share - len(episodes) // self.config.completions
        if not episodes:
            raise TreadleError(
                f"the openings of all {share} problems of a step fill the model's context of "
                f"{self.env.model.config.context} tokens: choose shorter ones"
            )
        for failure in dict.fromkeys(f for e in episodes for f in e.failures):
            if failure not in self.told and len(self.told) < TOLD:
                self.told.add(failure)
                self.env.say(f"environment: {failure}")
        return episodes

    def _batches(self, lanes: list[Lane], advantages: Tensor) -> tuple[PolicyBatch, ...]:
        rows = advantages.tolist()
        return tuple(
            self.annotate(
                lanes_batch(
                    [lanes[i] for i in run],
                    [rows[i] for i in run],
                    self.config.sampling.temperature,
                )
            )
            for run in within_budget([lane.size for lane in lanes], self.config.tokens)
        )

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "left_out": self.left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.left_out = int(state["drawn"]), int(state["left_out"])


def lanes_of(episodes: list[Episode], copies: int) -> list[Lane]:
    """Of each problem and seat its plays, where it spoke in more than one of them."""
    lanes = []
    for start in range(0, len(episodes), copies):
        group = episodes[start : start + copies]
        for place in range(len(group[0].seats)):
            seats = tuple(e.seats[place] for e in group)
            if sum(bool(seat.logprobs) for seat in seats) > 1:
                lanes.append(Lane(seats))
    return lanes


def lanes_batch(
    lanes: list[Lane], advantages: list[list[float]], temperature: float
) -> PolicyBatch:
    """Plays that begin with the same words share them."""
    trees: dict[tuple[int, ...], list[Answer]] = {}
    for lane, row in zip(lanes, advantages, strict=True):
        for seat, advantage in zip(lane.seats, row, strict=True):
            if seat.logprobs:
                answer = Answer(seat.tokens, seat.learned, seat.logprobs, advantage)
                trees.setdefault(seat.prompt, []).append(answer)
    return answers_batch(list(trees.items()), temperature)


def played_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Means over plays; `environment_failures` is a count."""
    seats = [seat for e in episodes for seat in e.seats]
    count = len(episodes)
    return {
        "reward": sum(s.reward for s in seats) / len(seats),
        "turns": sum(e.turns for e in episodes) / count,
        "completion_tokens": sum(len(s.logprobs) for s in seats) / len(seats),
        "cut_off": sum(e.cut_off for e in episodes) / count,
        "environment_failures": float(sum(len(e.failures) for e in episodes)),
    }
