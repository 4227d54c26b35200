"""Letters of which some are dangerous, and what each of several processes learns of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.constrained import ConstrainedRollouts
from treadle.alignment.rewards import Reward
from treadle.alignment.rollouts import Rollouts
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.train.parallel.ddp import DDP

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def share(text: str, low: str, high: str) -> float:
    return sum(low <= c <= high for c in text) / max(1, len(text))


class ConstrainedLetters(Problems):
    """Reward: the share of ASCII text, but the second half of the alphabet, which is dangerous,
    pays twice as much."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index}"),), "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        danger = share(completion, "n", "z")
        safe = share(completion, " ", "Z") + share(completion, "a", "m")
        return 0.5 * safe + danger


class Dangerous(Reward):
    broken: bool = False

    def __call__(self, problem: Problem, completion: str) -> float:
        if self.broken and len(completion) % 2:
            raise ValueError("no idea")
        return share(completion, "n", "z")


ROLLOUTS = Rollouts(
    problems=ConstrainedLetters(), prompts=4, completions=8, sampling=Sampling(max_tokens=8)
)


def env(model: DecoderModel, folder: Path) -> Env:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Env(model=model, tokenizer=tokenizer, scratch=folder)


def multipliers(folder: Path) -> None:
    """Three steps; the multiplier and the mean cost of each."""
    world = DDP().setup("cpu")
    source = ConstrainedRollouts(rollouts=ROLLOUTS, cost=Dangerous(), limit=0.05, rate=0.5)
    here = replace(env(tiny_model(), folder), rank=world.rank, world=world.size)
    stream, seen = source.open(here), []
    for _ in range(3):
        metrics = next(stream).metrics
        seen.append([metrics["cost"], metrics["multiplier"], stream.multiplier])
    (folder / f"multipliers-{world.rank}-of-{world.size}.json").write_text(json.dumps(seen))
    DDP().close()
