"""Rollouts: trees give the log-probabilities of separate sequences; learning; bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.advantages import GroupCentred, GroupNormalised, LeaveOneOut
from treadle.alignment.rollouts import Rollouts
from treadle.core.errors import TreadleError
from treadle.data.problems import Interleaved, Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class Letters(Problems):
    """Reward: the share of the text that is of some letters."""

    letters: str = "abcdefghijklmnopqrstuvwxyz"
    level: float | None = None
    """Give every answer this reward."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index}"),), self.letters, "letters")

    def score(self, problem: Problem, completion: str) -> float:
        if self.level is not None:
            return self.level
        return sum(c in self.letters for c in completion) / max(1, len(completion))


class LongLetters(Letters):
    """Every prompt begins with the same pages."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"{'write many letters ' * 3}{index}"),), self.letters, "letters")


def env(model: DecoderModel, folder: Path) -> Env:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Env(model=model, tokenizer=tokenizer, scratch=folder)


def test_tree_logprobs_equal_those_of_sampling(tmp_path: Path) -> None:
    """What the engine recorded with its cache is what the update computes on the tree."""
    model = tiny_model(5, None)
    sampling = Sampling(max_tokens=20, temperature=0.8)
    source = Rollouts(problems=Letters(), prompts=4, completions=3, sampling=sampling, tokens=150)
    work = next(source.open(env(model, tmp_path)))
    assert len(work.batches) > 1
    for batch in work.batches:
        output = GRPO()(model, batch)
        assert float(output.metrics["mismatch"] / output.weight) < 1e-5


def test_no_page_outlives_the_weights_that_computed_it(tmp_path: Path) -> None:
    """The same long prompt before and after an update: behaviour is that of the new weights."""
    model = tiny_model(5, None)
    problems = LongLetters(letters="aeiou")
    source = Rollouts(problems=problems, prompts=2, completions=4, sampling=Sampling(max_tokens=20))
    stream = source.open(env(model, tmp_path))
    next(stream)
    model.load_state_dict(tiny_model(5, None, seed=4).state_dict())
    work = next(stream)
    for batch in work.batches:
        output = GRPO()(model, batch)
        assert float(output.metrics["mismatch"] / output.weight) < 1e-5


def test_advantages_closed_forms() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    centred = rewards - rewards.mean(-1, keepdim=True)
    torch.testing.assert_close(GroupCentred()(rewards), centred)
    expected = centred / (rewards.std(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(GroupNormalised()(rewards), expected)
    loo = LeaveOneOut()(rewards)
    assert float(loo[2, 3]) == 3.0
    assert float(loo[2, 0]) == -1.0
    # Leave-one-out is the centred advantage times G / (G - 1).
    torch.testing.assert_close(loo, centred * 4 / 3)


class Rewards(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report.metrics["reward"])


def test_reward_rises(tmp_path: Path) -> None:
    model, rewards = tiny_model(), Rewards()
    source = Rollouts(problems=Letters(), prompts=4, completions=8, sampling=Sampling(max_tokens=8))
    plan = SingleProcess()
    fit(
        model,
        source.open(env(model, tmp_path)),
        GRPO(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=24, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=tmp_path / "checkpoints",
        hooks=[rewards],
    )
    assert sum(rewards.seen[:3]) / 3 < 0.2
    assert sum(rewards.seen[-5:]) / 5 > 0.6


def test_stream_state_brings_the_same_problems_and_samples(tmp_path: Path) -> None:
    source = Rollouts(problems=Letters(), prompts=2, completions=2, sampling=Sampling(max_tokens=5))
    first = source.open(env(tiny_model(), tmp_path))
    next(first)
    state = first.state()
    expected = next(first).batches[0].tokens
    again = source.open(env(tiny_model(), tmp_path))
    again.restore(state)
    torch.testing.assert_close(next(again).batches[0].tokens, expected)


def test_groups_without_signal_are_left_out_and_all_of_them_is_an_error(tmp_path: Path) -> None:
    flat = Letters(level=1.0)
    source = Rollouts(
        problems=Interleaved(families=(flat, Letters())),
        prompts=4,
        completions=16,
        sampling=Sampling(max_tokens=30),
    )
    work = next(source.open(env(tiny_model(), tmp_path)))
    assert work.metrics["groups_with_signal"] <= 0.5
    source = Rollouts(problems=flat, prompts=2, sampling=Sampling(max_tokens=4))
    with pytest.raises(TreadleError, match=r"rewards within every group were equal.*mean 1\.00"):
        next(source.open(env(tiny_model(), tmp_path)))
