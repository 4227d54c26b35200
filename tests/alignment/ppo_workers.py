"""A reward for letters by PPO, and what each of several processes has of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.ppo import PPORollouts
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.value_head import ValueHead
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.train.parallel.ddp import DDP

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class PPOLetters(Problems):
    """Reward: the share of the text that is letters."""

    weight: float = 1.0

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index % 3}"),), "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        return self.weight * sum(c.islower() for c in completion) / max(1, len(completion))


def env(model: DecoderModel, folder: Path) -> Env:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Env(model=model, tokenizer=tokenizer, scratch=folder)


def source(**changes) -> PPORollouts:
    rollouts = Rollouts(
        problems=PPOLetters(), prompts=4, completions=4, sampling=Sampling(max_tokens=8)
    )
    return PPORollouts(rollouts=rollouts).replace(**changes)


def moved(model: DecoderModel) -> DecoderModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    return model


def lots(folder: Path) -> None:
    """Penalty and advantages of two lots, by a model that has moved from its reference."""
    world = DDP().setup("cpu")
    here = env(ValueHead()(tiny_model()), folder)
    config = source(epochs=1, minibatches=1, beta=0.1, target=1e-3, gain=0.5)
    stream, seen = config.open(replace(here, rank=world.rank, world=world.size)), []
    moved(here.model)
    for _ in range(2):
        next(stream)
        measured = {"kl": stream.metrics["kl"], "beta": stream.beta}
        seen.append({**measured, "advantages": [e.advantages for e in stream.lot]})
    (folder / f"lots-{world.rank}-of-{world.size}.json").write_text(json.dumps(seen))
    DDP().close()
