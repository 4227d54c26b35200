"""A constitution: what is revised, what is learned from it, and files that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.constitution import Principle, Revise, read_constitution, violations
from treadle.alignment.iterate import PairsOf
from treadle.alignment.preferences import Preferences
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.pipeline import Pipeline, Workspace, execute, read_manifest
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit
from treadle.train.precision import FP32
from treadle.train.run import Run, Trained

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
CONSTITUTION = """\
- name: quiet
  critique: Say where you shout.
  revise: Write it again, quietly.
  forbidden: '[k-z]'
- name: brief
  critique: Say what is too long.
  revise: Shorten it.
"""


class ShoutingModel(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(context=256).train(), folder)


class Anything(Problems):
    def problem(self, index: int) -> Problem:
        return Problem((user(f"say {index % 4}"),), "", "exact")

    def score(self, problem: Problem, completion: str) -> float:
        raise AssertionError("nothing is scored")


def test_violations_fall_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot criticise; a program revises for it. What is learned is the loop's."""
    real, talks = Revise._say, []

    def say(step: Revise, thinker, asked):
        talks.append(asked)
        last = [turns[-1]["content"] for turns in asked]
        if last[0].startswith(("Say where", "Say what")):
            return [f"critique of {turns[-2]['content']}" for turns in asked]
        if last[0].startswith(("Write it", "Shorten")):
            return [re.sub("[K-Zk-z]", "", turns[-4]["content"]) for turns in asked]
        return real(step, thinker, asked)

    monkeypatch.setattr(Revise, "_say", say)
    path = tmp_path / "principles.yaml"
    path.write_text(CONSTITUTION)
    revise = Revise(
        name="revise",
        model=ShoutingModel(),
        problems=Anything(),
        constitution=str(path),
        count=64,
        sampling=Sampling(max_tokens=8),
    )
    train = Run(
        name="train",
        model=ShoutingModel(),
        source=Preferences(pairs=PairsOf(step="revise"), per_step=16),
        objective=DPO(beta=0.1, anchor=1.0),
        optimizer=AdamW(lr=5e-3),
        schedule=Constant(),
        fit=Fit(steps=25, precision=FP32()),
    )
    again = revise.replace(name="again", model=Trained(step="train"))
    execute(Pipeline(name="p", steps=(revise, train, again)), tmp_path / "run")
    before, after = (read_manifest(tmp_path / "run" / n)["metrics"] for n in ("revise", "again"))
    assert before["violations_before"] > 0.4
    assert before["violations_after"] == 0.0
    assert after["violations_before"] < 0.5 * before["violations_before"]
    rows = (tmp_path / "run" / "revise" / "pairs.jsonl").read_text().splitlines()
    assert len(rows) == before["revised"]
    row = json.loads(rows[0])
    assert row["chosen"] == re.sub("[K-Zk-z]", "", row["rejected"]) != row["rejected"]
    assert row["critique"] == f"critique of {row['rejected']}"
    roles = [[t["role"] for t in talk[0]] for talk in talks[:3]]
    assert roles == [
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
    ]


def test_principles_are_read_and_violations_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONSTITUTION)
    quiet, brief = read_constitution(str(path))
    assert (quiet.name, brief.revise, brief.forbidden) == ("quiet", "Shorten it.", None)
    assert violations((quiet, brief), ["abc", "XYZ", "12", "k"]) == 0.5
    assert not Principle("n", "c", "r").violated("anything")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a constitution is a list of principles"),
        ("name: x", "a constitution is a list of principles"),
        ("- [", "not valid YAML"),
        ("- name: x\n  critique: y\n", "principle 1: it lacks `revise`"),
        ("- name: x\n  critique: y\n  revise: z\n  forbid: q", "has no use for `forbid`"),
        ("- name: x\n  critique: y\n  revise: z\n  forbidden: '('", "no regular expression"),
        ("- name: 3\n  critique: y\n  revise: z", "each a text"),
    ],
)
def test_files_that_are_no_constitution(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_constitution(str(path))
    with pytest.raises(TreadleError, match=r"nowhere\.yaml cannot be read"):
        read_constitution(str(tmp_path / "nowhere.yaml"))
