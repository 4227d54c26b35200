"""Constitutional AI: a model criticises and revises its own answers by written principles.

For each problem the model answers, criticises its answer by a principle that is drawn, and writes
it anew; then again by another. Answer and last revision are a pair to learn from: for SFT the
revision alone, for DPO both. Bai et al. 2022, arXiv:2212.08073. The principles are a YAML file:

    - name: kind
      critique: Say where the answer is unkind.
      revise: Write the answer again, without what is unkind.
      prefer: Choose the answer that is kinder.
      forbidden: '\\b(stupid|idiot)\\b'

`forbidden` is a pattern whose matches are violations; those before and after are counted. By
`prefer`, `ByConstitution` asks a judge which of two answers is better: preferences from AI. Both
may be left out.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from treadle.alignment.feedback import Comparison, Labeller, Verdict
from treadle.alignment.iterate import PAIRS, opened_thinker, sampled
from treadle.alignment.judge import ByJudge
from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.core.results import EVALUATION, accuracy
from treadle.data.problems import Problems
from treadle.inference.reasoning.strategy import Ask, Thinker, Turns
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="al.constitution",
    paper="Bai et al. 2022, arXiv:2212.08073",
    summary="Answers revised, and then judged, by the principles of a YAML file.",
    recipe="treadle run constitution steps.revise.constitution=docs/principles.yaml",
    oracle="tests/alignment/test_alignment_constitution.py::test_violations_fall_after_training",
)
KEYS = ("name", "critique", "revise", "prefer", "forbidden")
PRINCIPLES = "principles.yaml"
"""The copy of its constitution that a step keeps."""


@dataclass(frozen=True)
class Principle:
    """One rule of a constitution."""

    name: str
    critique: str
    revise: str
    prefer: str = ""
    forbidden: re.Pattern[str] | None = None

    def violated(self, text: str) -> bool:
        return self.forbidden is not None and self.forbidden.search(text) is not None


def read_constitution(path: str) -> tuple[Principle, ...]:
    """Raises FileFormatError where the file is not a list of principles; names the place."""
    try:
        rows = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TreadleError(f"the constitution {path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, YAMLError) as error:
        raise FileFormatError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise FileFormatError(f"{path}: a constitution is a list of principles")
    return tuple(_principle(row, f"{path}: principle {i}") for i, row in enumerate(rows, 1))


def _principle(row: Any, where: str) -> Principle:
    if not isinstance(row, dict) or not all(isinstance(v, str) and v for v in row.values()):
        raise FileFormatError(f"{where}: write {', '.join(KEYS)}, each a text")
    odd, missing = set(row) - set(KEYS), set(KEYS[:3]) - set(row)
    if odd or missing:
        what = f"has no use for `{min(map(str, odd))}`" if odd else f"lacks `{min(missing)}`"
        raise FileFormatError(f"{where}: it {what}; a principle has {', '.join(KEYS)}")
    try:
        pattern = re.compile(row["forbidden"], re.IGNORECASE) if "forbidden" in row else None
    except re.error as error:
        raise FileFormatError(f"{where}: `forbidden` is no regular expression: {error}") from None
    return Principle(row["name"], row["critique"], row["revise"], row.get("prefer", ""), pattern)


class Revise(Step):
    """Pairs of a revised answer and the first one."""

    model: ModelSource
    problems: Problems
    """What is asked; their verifiers are not."""
    constitution: str = Field(min_length=1)
    """A YAML file of principles."""
    count: int = Field(64, ge=1)
    rounds: int = Field(1, ge=1)
    """Revisions of each answer."""
    sampling: Sampling = Sampling(max_tokens=112)
    precision: Precision = Auto()
    seed: int = 0

    def check(self, workspace: Workspace) -> None:
        read_constitution(self.constitution)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        principles = read_constitution(self.constitution)
        shutil.copyfile(self.constitution, workspace.folder / PRINCIPLES)
        problems = [self.problems.problem(i) for i in range(self.count)]
        asked: list[Turns] = [tuple(m.plain() for m in p.prompt) for p in problems]
        thinker = opened_thinker(self.model, workspace, self.precision)
        first = self._say(thinker, asked)
        revised, critiques = first, [""] * len(first)
        draw = random.Random(self.seed)
        for _ in range(self.rounds):
            chosen = [draw.choice(principles) for _ in problems]
            talks = [_after(*row) for row in zip(asked, revised, chosen, strict=True)]
            critiques = self._say(thinker, talks)
            talks = [_revision(*row) for row in zip(talks, critiques, chosen, strict=True)]
            # What was not written anew, for want of room or of words, stays as it was.
            said = self._say(thinker, talks)
            revised = [s if s.strip() else r for s, r in zip(said, revised, strict=True)]
        rows = [
            {"prompt": list(turns), "chosen": after, "rejected": before, "critique": critique}
            for turns, after, before, critique in zip(asked, revised, first, critiques, strict=True)
            if before.strip() and after.strip() != before.strip()
        ]
        if not rows:
            raise TreadleError(f"{self.name}: no answer was changed by its revision")
        write_text(workspace.folder / PAIRS, "".join(json.dumps(r) + "\n" for r in rows))
        return {
            "kind": "revisions",
            "revised": len(rows),
            "conversations_too_long": thinker.overflows,
            "violations_before": violations(principles, first),
            "violations_after": violations(principles, revised),
        }

    def _say(self, thinker: Thinker, talks: Sequence[Turns]) -> list[str]:
        asks = [Ask(i, turns) for i, turns in enumerate(talks)]
        return [row[0].text for row in thinker.ask(asks, self.sampling)]


class ConstitutionOf(Reads):
    """The constitution by which a step `Revise` worked."""

    def read(self, workspace: Workspace) -> tuple[Principle, ...]:
        return read_constitution(str(workspace.output(self.step) / PRINCIPLES))


class Violations(Step):
    """The share of a model's answers that violate a principle, whatever they are asked."""

    model: ModelSource
    subject: str
    """The stage that is measured."""
    problems: Problems
    constitution: ConstitutionOf
    count: int = Field(64, ge=1)
    sampling: Sampling = Sampling(max_tokens=112)
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        principles = self.constitution.read(workspace)
        problems = [self.problems.problem(i) for i in range(self.count)]
        answers = sampled(self.sampling, self.precision, workspace, self.model, problems, 1)
        kept = [float(violations(principles, texts) == 0) for texts in answers.texts]
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": {"principles kept": accuracy(kept)},
            "tokens_per_second": None,
            "size_bytes": None,
            "prompts_too_long": answers.too_long,
        }


class ByConstitution(Labeller):
    """A judge, asked by a principle that is drawn for each comparison."""

    constitution: ConstitutionOf
    judge: ByJudge = ByJudge()
    seed: int = 0

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        """Raises TreadleError where no principle says what to prefer."""
        prefer = [p.prefer for p in self.constitution.read(workspace) if p.prefer]
        if not prefer:
            raise TreadleError(
                f"ByConstitution: no principle of step `{self.constitution.step}` says what to "
                "`prefer`: write it for one at least"
            )
        draw = random.Random(self.seed)
        drawn = [draw.choice(prefer) for _ in comparisons]
        return self.judge.by_principles(comparisons, drawn, workspace)


def violations(principles: Sequence[Principle], texts: Sequence[str]) -> float:
    """Share of texts that violate a principle."""
    return sum(any(p.violated(t) for p in principles) for t in texts) / len(texts)


def _after(asked: Turns, answer: str, principle: Principle) -> Turns:
    return (
        *asked,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": principle.critique},
    )


def _revision(talk: Turns, critique: str, principle: Principle) -> Turns:
    return (
        *talk,
        {"role": "assistant", "content": critique},
        {"role": "user", "content": principle.revise},
    )
