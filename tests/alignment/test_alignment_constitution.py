"""A constitution: what is revised, what is learned from it, and files that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment import constitution
from treadle.alignment.constitution import (
    ByConstitution,
    ConstitutionOf,
    Principle,
    Revise,
    Violations,
    read_constitution,
    violations,
)
from treadle.alignment.feedback import Comparison, Verdict
from treadle.alignment.iterate import Answers, PairsOf
from treadle.alignment.judge import ByJudge
from treadle.alignment.preferences import Preferences
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
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
        precision=FP32(),
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
        fit=Fit(steps=60, precision=FP32()),
    )
    again = Violations(
        precision=FP32(),
        name="again",
        model=Trained(step="train"),
        subject="train",
        problems=Anything(),
        constitution=ConstitutionOf(step="revise"),
        sampling=Sampling(max_tokens=8),
    )
    start = again.replace(name="start", model=ShoutingModel(), subject="base")
    execute(Pipeline(name="p", steps=(revise, start, train, again)), tmp_path / "run")
    before = read_manifest(tmp_path / "run" / "revise")["metrics"]
    assert before["violations_before"] > 0.4
    assert before["violations_after"] == 0.0
    first, last = (
        read_manifest(tmp_path / "run" / n)["metrics"]["results"]["principles kept"]["value"]
        for n in ("start", "again")
    )
    assert first == pytest.approx(1 - before["violations_before"])
    assert 1 - last < 0.5 * (1 - first)
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


def test_a_revision_without_words_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = ["c"] * 3
    # The third answer says nothing at first: there is nothing that its revision is better than.
    said = iter((["one", "two", " "], c, ["  ", "three", "x"], c, ["four", "three", "y"]))
    monkeypatch.setattr(Revise, "_say", lambda *_: next(said))
    path = tmp_path / "principles.yaml"
    path.write_text(CONSTITUTION)
    revise = Revise(
        precision=FP32(),
        name="revise",
        model=ShoutingModel(),
        problems=Anything(),
        constitution=str(path),
        count=3,
        rounds=2,
    )
    execute(Pipeline(name="p", steps=(revise,)), tmp_path / "run")
    rows = (tmp_path / "run" / "revise" / "pairs.jsonl").read_text().splitlines()
    pairs = [(r["rejected"], r["chosen"]) for r in map(json.loads, rows)]
    assert pairs == [("one", "four"), ("two", "three")]
    said = iter((["one", "two", ""], c, ["one ", "", "new"]))
    with pytest.raises(TreadleError, match="revise: no answer was changed by its revision"):
        execute(Pipeline(name="p", steps=(revise.replace(rounds=1),)), tmp_path / "same")


def test_a_judge_goes_by_the_constitution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison by one of the principles that say what to prefer."""
    seen: list[str] = []

    def note(judge, comparisons, principles, workspace):
        seen.extend(principles)
        return [Verdict(1.0) for _ in comparisons]

    monkeypatch.setattr(ByJudge, "by_principles", note)
    folder = tmp_path / "revise"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    path = folder / "principles.yaml"
    path.write_text(CONSTITUTION.replace("  revise: S", "  prefer: the short one\n  revise: S"))
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()))
    labeller = ByConstitution(constitution=ConstitutionOf(step="revise"))
    pairs = [Comparison(Anything().problem(0), "a", "b")] * 5
    assert len(labeller(pairs, Anything(), workspace)) == 5
    assert seen == ["the short one"] * 5
    seen.clear()
    path.write_text(CONSTITUTION.replace("  revise: ", "  prefer: p\n  revise: "))
    path.write_text(path.read_text().replace("prefer: p", "prefer: q", 1))
    labeller(pairs * 8, Anything(), workspace)
    assert set(seen) == {"p", "q"}
    path.write_text(CONSTITUTION)
    with pytest.raises(TreadleError, match="no principle of step `revise` says what to `prefer`"):
        labeller(pairs, Anything(), workspace)


def test_principles_are_read_and_violations_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONSTITUTION)
    quiet, brief = read_constitution(str(path))
    assert (quiet.name, brief.revise, brief.forbidden) == ("quiet", "Shorten it.", None)
    assert violations((quiet, brief), ["abc", "XYZ", "12", "k"]) == 0.5
    assert not Principle("n", "c", "r").violated("anything")


def test_the_share_of_answers_that_keep_the_principles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [["abc"], ["XYZ"], [""], ["k"], ["d"]]
    monkeypatch.setattr(constitution, "sampled", lambda *_: Answers(texts, too_long=1))
    folder = tmp_path / "revise"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "principles.yaml").write_text(CONSTITUTION)
    step = Violations(
        precision=FP32(),
        name="v",
        subject="s",
        model=ShoutingModel(),
        problems=Anything(),
        constitution=ConstitutionOf(step="revise"),
        count=5,
    )
    found = step.execute(Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=())))
    assert found["results"]["principles kept"]["value"] == 3 / 5
    assert found["prompts_too_long"] == 1


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
        ("- name: x\n  critique: y\n  revise: z\n  zeal: q\n  1: q", "has no use for `1`"),
        ("- name: x\n  critique: ''\n  revise: z", "each a text"),
    ],
)
def test_files_that_are_no_constitution(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_constitution(str(path))
    with pytest.raises(TreadleError, match=r"nowhere\.yaml cannot be read"):
        read_constitution(str(tmp_path / "nowhere.yaml"))


def test_a_constitution_is_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("- name: \u00fc".encode("latin-1"))
    with pytest.raises(FileFormatError, match="not valid YAML: 'utf-8' codec can't decode"):
        read_constitution(str(path))


def test_a_constitution_that_is_not_there_is_found_before_anything_runs(tmp_path: Path) -> None:
    first = Violations(
        name="first", model=ShoutingModel(), subject="base", problems=Anything(),
        constitution=ConstitutionOf(step="earlier"),
    )  # fmt: skip
    revise = Revise(
        name="revise", model=ShoutingModel(), problems=Anything(), constitution="nowhere.yaml"
    )
    steps = (
        revise.replace(name="earlier", constitution=str(tmp_path / "good.yaml")),
        first,
        revise,
    )
    (tmp_path / "good.yaml").write_text(CONSTITUTION)
    with pytest.raises(TreadleError, match="`revise` cannot run: the constitution nowhere"):
        execute(Pipeline(name="p", steps=steps), tmp_path / "run")
    assert not (tmp_path / "run" / "earlier" / "pairs.jsonl").exists()
