"""Rejection sampling as a step: what is written, what an interruption leaves, what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.rejection import (
    ACCEPTED,
    JoinedConversations,
    RejectionSample,
    Sampled,
    SampledAndGeneral,
)
from treadle.alignment.rollouts import Rollouts
from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.conversations import ConversationFiles
from treadle.data.problems import Problems
from treadle.data.records import Chat, Problem, assistant, user
from treadle.data.source import Env
from treadle.data.supervised import Conversations
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


class FirstLetter(Problems):
    """Right is what begins below a bound."""

    bound: int = 100

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "low", "low")

    def score(self, problem: Problem, completion: str) -> float:
        return float(bool(completion) and ord(completion[0]) < self.bound)


class RejectionBytes(ModelSource):
    """Ends its text often."""

    def open(self, workspace: Workspace) -> Opened:
        model = tiny_model()
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(model, folder)


def sampling_step(**changes: object) -> RejectionSample:
    rollouts = Rollouts(
        problems=FirstLetter(), prompts=4, completions=6, sampling=Sampling(max_tokens=40)
    )
    return RejectionSample(
        name="sample", model=RejectionBytes(), rollouts=rollouts, rounds=3, precision=FP32()
    ).replace(**changes)


def rows_of(root: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(x) for x in (root / "sample" / ACCEPTED).read_text().splitlines()]


def test_only_what_the_verifier_accepts_is_kept(tmp_path: Path) -> None:
    """Against the same rollouts looked at one by one."""
    execute(Pipeline(name="p", steps=(sampling_step(),)), tmp_path)
    env = Env(
        model=tiny_model(), tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=tmp_path
    )
    stream = sampling_step().rollouts.open(env)
    expected, accepted, sampled = [], 0, 0
    for _ in range(3):
        for group in stream.roll():
            right = [
                c.text.strip()
                for c in group.completions
                if c.finish == "stop" and c.text.strip() and ord(c.text[0]) < 100
            ]
            accepted, sampled = accepted + len(right), sampled + 6
            expected += [(group.problem.prompt[0].content, t) for t in dict.fromkeys(right)][:2]
    rows = rows_of(tmp_path)
    assert [tuple(m["content"] for m in row["messages"]) for row in rows] == expected
    assert {m["role"] for row in rows for m in row["messages"]} == {"user", "assistant"}
    metrics = read_manifest(tmp_path / "sample")["metrics"]
    assert 0 < accepted < sampled == 72
    assert (metrics["accepted"], metrics["sampled"], metrics["asked"]) == (accepted, 72, 12)
    assert metrics["kept"] == len(rows)
    assert metrics["solved"] == len({row["messages"][0]["content"] for row in rows})


def test_finished_rounds_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(Pipeline(name="p", steps=(sampling_step(),)), tmp_path / "whole")
    roll = RejectionSample._round
    done: list[int] = []

    def stop_at_the_second(self, groups):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return roll(self, groups)

    monkeypatch.setattr(RejectionSample, "_round", stop_at_the_second)
    cut = Pipeline(name="p", steps=(sampling_step(),))
    with pytest.raises(KeyboardInterrupt):
        execute(cut, tmp_path / "cut")
    monkeypatch.undo()
    first = (tmp_path / "cut/sample/round-0.json").stat().st_mtime_ns
    execute(cut, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert (tmp_path / "cut/sample/round-0.json").stat().st_mtime_ns == first


def test_nothing_accepted_is_a_clear_error(tmp_path: Path) -> None:
    rollouts = sampling_step().rollouts.replace(problems=FirstLetter(bound=0))
    step = sampling_step(rollouts=rollouts, rounds=2)
    with pytest.raises(TreadleError, match="accepted none of 8 problems' answers"):
        execute(Pipeline(name="p", steps=(step,)), tmp_path)


def test_what_was_sampled_is_learned_with_the_general(tmp_path: Path) -> None:
    """An epoch has every conversation once, of both kinds."""
    pipeline = Pipeline(name="p", steps=(sampling_step(),))
    execute(pipeline, tmp_path)
    own = tmp_path / "own.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    own.write_text(json.dumps({"messages": chat}) + "\n")
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    workspace = Workspace(tmp_path, tmp_path / "sft", pipeline)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path, workspace=workspace)
    rows = rows_of(tmp_path)
    source = SampledAndGeneral(
        sampled=(Sampled(step="sample"),),
        general=(ConversationFiles(path=str(own)),),
        per_step=len(rows) + 1,
    )
    work = next(source.open(env))
    learned = sorted(
        tokenizer.decode(b.targets[b.sequences == i].tolist())
        for b in work.batches
        for i in range(b.sequence_count)
    )
    assert learned == sorted([*(r["messages"][1]["content"] for r in rows), "ho"])
    with pytest.raises(TreadleError, match="give Env a workspace"):
        source.open(Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path))


class Counted(Conversations):
    word: str
    amount: int | None = 2

    def conversation(self, index: int) -> Chat:
        return Chat((user("q"), assistant(f"{self.word}{index}")))

    def count(self) -> int | None:
        return self.amount


def test_conversations_follow_each_other() -> None:
    joined = JoinedConversations(of=(Counted(word="a"), Counted(word="b", amount=3)))
    said = [joined.conversation(i).messages[1].content for i in range(5)]
    assert said == ["a0", "a1", "b0", "b1", "b2"]
    assert joined.count() == 5
    endless = JoinedConversations(of=(Counted(word="a"), Counted(word="b", amount=None)))
    assert endless.count() is None
    assert endless.conversation(9).messages[1].content == "b7"
    with pytest.raises(TreadleError, match="Counted never ends: put it last"):
        JoinedConversations(of=(Counted(word="b", amount=None), Counted(word="a"))).conversation(0)
