"""Rollouts: trees give the log-probabilities of separate sequences; learning; bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from alignment.learn import Seen, learn
from alignment.rollouts_workers import learn_in_step
from safetensors.torch import load_file
from tiny_generation import END, byte_tokenizer, tiny_model
from train.processes import launch

from treadle.alignment.advantages import (
    Advantage,
    BatchNormalised,
    GroupCentred,
    GroupCentredBatchNormalised,
    GroupNormalised,
    LeaveOneOut,
)
from treadle.alignment.frozen import FrozenCopy
from treadle.alignment.rewards import Part, Reward, Weighted
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.samplers import OwnWeights, Sample, Sampler
from treadle.alignment.watch import repetition
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Silent
from treadle.data.problems import Interleaved, Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.objectives.kl import K2
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import WarnAbove
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


@pytest.mark.parametrize(
    "advantage",
    [
        GroupNormalised(),
        GroupCentred(),
        LeaveOneOut(),
        BatchNormalised(),
        GroupCentredBatchNormalised(),
    ],
    ids=lambda a: type(a).__name__,
)
def test_equal_rewards_have_no_advantage(advantage: Advantage) -> None:
    """Not even the rounding of their mean, which a standard deviation near 0 would blow up."""
    for group in (2, 3, 6, 8, 12, 16):
        for reward in (0.1, 0.3, 1 / 3, 0.9):
            assert not advantage(torch.full((4, group), reward)).any()


def test_advantages_over_the_batch_match_the_paper() -> None:
    """REINFORCE++ and its baseline form, in float64."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    r = rewards.numpy().astype("float64")
    whole = (r - r.mean()) / r.std(ddof=1)
    torch.testing.assert_close(BatchNormalised()(rewards), torch.tensor(whole).float())
    centred = r - r.mean(-1, keepdims=True)
    based = torch.tensor(centred / centred.std(ddof=1)).float()
    torch.testing.assert_close(GroupCentredBatchNormalised()(rewards), based)
    same = torch.ones(2, 3)
    assert float(BatchNormalised()(same).abs().max()) == 0.0
    assert float(GroupCentredBatchNormalised()(same).abs().max()) == 0.0


def test_the_reference_is_the_model_as_it_was(tmp_path: Path) -> None:
    """Its log-probabilities equal those of sampling at first, and stay as the model moves."""
    model = tiny_model()
    sampling = Sampling(max_tokens=6, temperature=0.8)
    source = Rollouts(
        problems=Letters(), prompts=2, completions=4, sampling=sampling, reference=FrozenCopy()
    )
    stream = source.open(env(model, tmp_path))
    first = next(stream).batches[0]
    torch.testing.assert_close(first.reference, first.behaviour, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    second = next(stream).batches[0]
    assert (second.reference - second.behaviour).abs().max() > 0.1
    output = GRPO(beta=0.1, kl=K2())(model, second)
    assert float(output.metrics["kl"]) > 0
    plain = Rollouts(problems=Letters(), prompts=2, completions=4, sampling=sampling)
    with pytest.raises(TreadleError, match="asks for a reference"):
        GRPO(beta=0.1)(model, next(plain.open(env(model, tmp_path))).batches[0])


class Faulty(Reward):
    """Fails in a way of its own for some letters at the start."""

    always: bool = False

    def __call__(self, problem: Problem, completion: str) -> float:
        kind = ord(completion[0]) % 4 if completion and not self.always else 0
        if kind == 0:
            raise ZeroDivisionError("oops")
        if kind == 1:
            while True:
                pass
        return float("nan") if kind == 2 else 1.0


def test_failing_verifiers_are_counted(tmp_path: Path) -> None:
    parts = (Part(name="sane", reward=Constantly()), Part(name="mad", reward=Faulty()))
    source = Rollouts(
        problems=Letters(),
        prompts=2,
        completions=8,
        sampling=Sampling(max_tokens=4),
        reward=Weighted(parts=parts),
        patience=0.05,
    )
    metrics = next(source.open(env(tiny_model(), tmp_path))).metrics
    assert 0 < metrics["rewards_failed"] < 16
    assert metrics["reward_sane"] == 0.5
    assert metrics["reward_mad"] == 1.0
    broken = source.replace(reward=Faulty(always=True))
    with pytest.raises(
        TreadleError, match=r"failed for all 16 completions.*ZeroDivisionError: oops"
    ):
        next(broken.open(env(tiny_model(), tmp_path)))


class Log(Silent):
    """What a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def logged(model: DecoderModel, folder: Path) -> tuple[Env, Log]:
    log = Log()
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()), log)
    return replace(env(model, folder), workspace=workspace), log


def test_faults_are_named_in_the_log_once(tmp_path: Path) -> None:
    source = Rollouts(
        problems=Long(),
        prompts=4,
        completions=8,
        sampling=Sampling(max_tokens=4),
        reward=Faulty(),
        patience=0.05,
    )
    here, log = logged(tiny_model(), tmp_path)
    stream = source.open(here)
    next(stream)
    next(stream)
    assert sorted(log.lines) == [
        "rollouts: a completion was left without its reward: OvertimeError: no answer within "
        "0.05 s",
        "rollouts: a completion was left without its reward: ZeroDivisionError: oops",
        "rollouts: a completion was left without its reward: the reward was nan",
        *(
            f"rollouts: problem {i} is left out: its prompt of 205 tokens fills the model's "
            "context of 128"
            for i in (0, 2, 4, 6)
        ),
    ]


def test_measures_of_a_step(tmp_path: Path) -> None:
    """Against the step's own completions; it samples as it will be used, and goes on learning."""
    likely = {END: 8.0} | dict.fromkeys(byte_tokenizer().encode("abcdefgh"), 4.0)
    source = Rollouts(
        problems=Letters(),
        prompts=3,
        completions=6,
        sampling=Sampling(max_tokens=3, logit_bias=tuple(likely.items())),
    )
    model = tiny_model().train()
    groups = source.open(env(model, tmp_path)).roll()
    stream = source.open(env(model, tmp_path))
    sample = stream.sample

    def watched(requests):
        assert not model.training
        return sample(requests)

    stream.sample = watched
    metrics = next(stream).metrics
    assert model.training
    rewards = [list(g.rewards) for g in groups]
    every = [c for g in groups for c in g.completions]
    assert 0 < metrics["solved"] < 1
    assert 0 < metrics["empty"] < 1
    assert 0 < metrics["cut_off"] < 1
    expected = {
        "reward": fmean(r for row in rewards for r in row),
        "reward_std": fmean(stdev(row) for row in rewards),
        "solved": fmean(r == 1.0 for row in rewards for r in row),
        "groups_with_signal": fmean(len(set(row)) > 1 for row in rewards),
        "completion_tokens": fmean(len(c.tokens) for c in every),
        "repetition": fmean(repetition(c.tokens) for c in every),
        "empty": fmean(c.text.strip() == "" for c in every),
        "cut_off": fmean(c.tokens[-1] != END for c in every),
        "redraws": 0.0,
    }
    assert {k: metrics[k] for k in expected} == pytest.approx(expected)


def test_ranks_share_the_problems(tmp_path: Path) -> None:
    """The second of two processes has the second half of a step's problems and their samples."""
    here = env(tiny_model(), tmp_path)
    source = Rollouts(problems=Letters(), prompts=4, completions=2, sampling=Sampling(max_tokens=3))
    whole, second = source.open(here), source.open(replace(here, rank=1, world=2))
    for _ in range(2):
        groups, half = whole.roll(), second.roll()
        assert [g.problem for g in half] == [g.problem for g in groups[2:]]
        for mine, theirs in zip(half, groups[2:], strict=True):
            assert [c.tokens for c in mine.completions] == [c.tokens for c in theirs.completions]
    assert groups[0].problem == Letters().problem(4)
    with pytest.raises(TreadleError, match="prompts=4 cannot be shared by 3 processes"):
        source.open(replace(here, world=3))


@pytest.mark.distributed
def test_two_ranks_learn_what_one_does_where_one_has_no_signal(tmp_path: Path) -> None:
    """And where neither has one, both draw anew."""
    launch(learn_in_step, 2, tmp_path, tmp_path)
    learn_in_step(tmp_path)
    alone, *ranks = (
        load_file(tmp_path / f"learned-{name}.safetensors")
        for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    for found in ranks:
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


def test_empty_completions_are_counted_and_learned(tmp_path: Path) -> None:
    """A model that ends at once: the stop token is its whole answer."""
    model = tiny_model()
    source = Rollouts(
        problems=Letters(),
        prompts=2,
        completions=8,
        sampling=Sampling(max_tokens=4, logit_bias=((END, 9.0),)),
    )
    work = next(source.open(env(model, tmp_path)))
    assert work.metrics["empty"] > 0.3
    output = GRPO()(model, work.batches[0])
    assert bool(torch.isfinite(output.total))


def test_a_mismatch_above_the_limit_is_said(tmp_path: Path) -> None:
    """A sampler that lies about its log-probabilities is found out in the first step."""
    model, plan = tiny_model(), SingleProcess()
    here, log = logged(model, tmp_path)
    for sampler, lines in ((OwnWeights(), 0), (Lying(by=0.25), 2)):
        log.lines.clear()
        source = Rollouts(
            problems=Letters(), prompts=2, sampling=Sampling(max_tokens=8), sampler=sampler
        )
        seen = Seen()
        fit(
            model,
            source.open(here),
            GRPO(),
            optimizer=AdamW(lr=1e-5),
            schedule=Constant(),
            config=Fit(steps=2, precision=FP32()),
            plan=plan,
            world=plan.setup("cpu"),
            folder=tmp_path / type(sampler).__name__,
            hooks=[seen, WarnAbove(log, "grpo")],
        )
        assert len(seen.metrics) == 2
        assert len(log.lines) == lines
    assert log.lines[0].startswith("grpo: step 1: mismatch 0.25 is above 0.1: what samples")
    assert log.lines[1] == "grpo: mismatch was above its limit in 2 of 2 steps"


class Lying(Sampler):
    by: float

    def open(self, env: Env, slots: int) -> Sample:
        sample = OwnWeights().open(env, slots)

        def lie(requests):
            return [
                [replace(c, logprobs=tuple(p - self.by for p in c.logprobs)) for c in row]
                for row in sample(requests)
            ]

        return lie


class Constantly(Reward):
    def __call__(self, problem: Problem, completion: str) -> float:
        return 0.5


class Long(Letters):
    """Every other prompt is too long for the model."""

    every: int = 2

    def problem(self, index: int) -> Problem:
        words = "long " * (40 if index % self.every == 0 else 1)
        return Problem((user(words),), self.letters, "letters")


def test_prompts_that_fill_the_context_are_counted(tmp_path: Path) -> None:
    source = Rollouts(problems=Long(), prompts=4, completions=8, sampling=Sampling(max_tokens=4))
    assert next(source.open(env(tiny_model(), tmp_path))).metrics["prompts_too_long"] == 2
    with pytest.raises(TreadleError, match="all 4 problems of a step fill the model's context"):
        next(source.replace(problems=Long(every=1)).open(env(tiny_model(), tmp_path)))


def test_reward_rises(tmp_path: Path) -> None:
    source = Rollouts(problems=Letters(), prompts=4, completions=8, sampling=Sampling(max_tokens=8))
    seen = learn(env(tiny_model(), tmp_path), source, steps=24)
    assert seen.early("reward", 3) < 0.2
    assert seen.late("reward", 5) > 0.6


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
