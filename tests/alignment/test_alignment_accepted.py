"""Rejection sampling: what is learned, what is sampled again, what a restart brings back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from low_problems import Low, model_that_ends, said
from tiny_generation import END, byte_tokenizer

from treadle.alignment.accepted import Accepted, Agreeing, Hint, Rewarded, with_hint
from treadle.alignment.rejection import accepted_texts
from treadle.alignment.rollouts import Group, Rollouts
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.rating import Scored
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def env(model: DecoderModel, folder: Path) -> Env:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Env(model=model, tokenizer=tokenizer, scratch=folder)


def source(problems: Problems, **changes) -> Accepted:
    rollouts = Rollouts(
        problems=problems, prompts=8, completions=8, sampling=Sampling(max_tokens=24)
    )
    return Accepted(rollouts=rollouts, **{"per_step": 4, **changes})


def texts(work) -> list[tuple[str, str]]:
    """Prompt and answer of each sequence of a step."""
    found = []
    tokenizer = byte_tokenizer()
    for batch in work.batches:
        for i, parent in enumerate(batch.layout.parents):
            if parent >= 0:
                spans = [batch.layout.span(j) for j in (parent, i)]
                found.append(
                    tuple(
                        tokenizer.decode([t for t in batch.tokens[list(s)].tolist() if t != END])
                        for s in spans
                    )
                )
    return found


def test_only_accepted_samples_are_trained(tmp_path: Path) -> None:
    problems = Low()
    stream = source(problems, keep=2).open(env(model_that_ends(), tmp_path))
    seen: dict[str, int] = {}
    for _ in range(4):
        work = next(stream)
        assert 0 < work.metrics["accepted"] < 1
        for prompt, answer in texts(work):
            assert problems.score(problems.problem(0), answer) == 1.0
            seen[prompt] = seen.get(prompt, 0) + 1
        for batch in work.batches:
            learned = {int(s) for s in batch.sequences}
            assert learned == set(range(batch.sequence_count))
            assert batch.weights.sum() == len(batch.targets)
    assert max(seen.values()) == 2
    assert all(prompt.startswith("u:q") for prompt in seen)


def test_the_majority_is_learned(tmp_path: Path) -> None:
    """Right or wrong; of a group that does not agree nothing is."""
    groups = [
        ("x Answer: 7", "y Answer: 7", "<think>Answer: 8</think>Answer: 7", "Answer: 8"),
        ("Answer: 1", "Answer: 2", "Answer: 3", "none"),
        ("none", "none", "none", "Answer: 4"),
    ]
    rollouts = Rollouts(problems=Low(), prompts=3, completions=4)
    stream = Accepted(rollouts=rollouts, accept=Agreeing(share=0.75), keep=4, per_step=3).open(
        env(model_that_ends(), tmp_path)
    )
    stream.rollouts.sample = lambda requests: [said(group) for group in groups]
    work = next(stream)
    assert [answer for _, answer in texts(work)] == list(groups[0][:3])
    assert work.metrics["accepted"] == 3 / 12
    assert work.metrics["accepted_reward"] == 1.0, "which the verifier only reports"
    wrong = Accepted(rollouts=rollouts.replace(problems=Low(bound=0)), accept=Agreeing(share=0.75))
    stream = wrong.open(env(model_that_ends(), tmp_path))
    stream.rollouts.sample = lambda requests: [said(group) for group in groups]
    work = next(stream)
    assert len(texts(work)) == 2, "keep"
    assert (work.metrics["reward"], work.metrics["accepted_reward"]) == (0.0, 0.0)
    stream.config = wrong.replace(accept=Agreeing(share=0.8))
    stream.place = 10
    with pytest.raises(TreadleError, match="no answer was accepted by Agreeing in 8 rounds"):
        next(stream)


def test_what_nobody_could_verify_is_not_accepted() -> None:
    """Though a threshold of 0 accepts any marks."""
    scores = tuple(Scored(v, failure=f) for v, f in ((0.0, ""), (0.0, "oops"), (1.0, "")))
    group = Group(Low().problem(0), (1,), said(["wrong", "odd", "right"]), scores)
    assert Rewarded(threshold=0.0)(group) == [True, False, True]
    assert Rewarded()(group) == [False, False, True]
    assert accepted_texts(group, 0.0) == ["wrong", "right"]
    assert accepted_texts(group, 1.0) == ["right"]


class Solved(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report.metrics["accepted"])


def test_accuracy_rises(tmp_path: Path) -> None:
    model, solved, plan = model_that_ends(), Solved(), SingleProcess()
    fit(
        model,
        source(Low(bound=80)).open(env(model, tmp_path)),
        CausalLM(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=30, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=tmp_path / "checkpoints",
        hooks=[solved],
    )
    assert sum(solved.seen[-4:]) / 4 > sum(solved.seen[:4]) / 4 + 0.2


def test_hints_help_and_are_not_learned(tmp_path: Path) -> None:
    problems = Low(told=True)
    with pytest.raises(TreadleError, match="no answer was accepted by Rewarded in 8 rounds"):
        next(source(problems).open(env(model_that_ends(), tmp_path)))
    stream = source(problems, hint=Hint()).open(env(model_that_ends(), tmp_path))
    work = next(stream)
    assert work.metrics["solved"] == 0.0
    assert work.metrics["hinted"] > 0
    for prompt, _ in texts(work):
        assert prompt.startswith("u:q")
        assert "low" not in prompt
    told = with_hint(problems.problem(3), Hint())
    assert told.prompt[-1].content == "q3\n(The answer is low. Show the way to it.)"


def test_ranks_share_a_step_of_problems(tmp_path: Path) -> None:
    here = env(model_that_ends(), tmp_path)
    whole, second = source(Low()), replace(here, world=2, rank=1)
    assert len({prompt for prompt, _ in texts(next(whole.open(here)))}) == 4
    assert len({prompt for prompt, _ in texts(next(whole.open(second)))}) == 2
    work = next(source(Low(told=True)).open(second))  # another may have an accepted answer
    assert work.batches == ()
    assert work.spare is not None
    assert work.spare.sequence_count == 1
    assert work.metrics["accepted"] == 0
    with pytest.raises(TreadleError, match="per_step=3 cannot be shared by 2 processes"):
        source(Low(), per_step=3).open(second)


def test_one_round_is_repeated(tmp_path: Path) -> None:
    stream = source(Low(), rounds=1, per_step=100).open(env(model_that_ends(), tmp_path))
    first, second = next(stream), next(stream)
    assert texts(first) == texts(second)
    assert second.metrics["round"] == 1


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    model = model_that_ends()
    stream = source(Low(), per_step=2).open(env(model, tmp_path))
    next(stream)
    state = stream.state()
    expected = [texts(next(stream)) for _ in range(4)]  # into the next round
    again = source(Low(), per_step=2).open(env(model, tmp_path))
    again.restore(state)
    assert [texts(next(again)) for _ in range(4)] == expected
