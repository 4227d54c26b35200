"""Iterative alignment: sample, have the answers compared, train on the verdicts, and again.

A round is two steps of a pipeline: `Compare` samples pairs of answers from the model as it is and
has them labelled, a `Run` learns from `PairsOf` it. Steps that are done are not done again, so the
loop goes on where it was stopped; `WinRate` compares each round's model with the first.
Xiong et al. 2023, iterative preference learning, arXiv:2312.11456.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from pydantic import Field

from treadle.alignment.feedback import ByMarks, Comparison, Labeller, Verdict, decided
from treadle.alignment.preferences import PairFiles, Pairs
from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.core.files import write_json, write_text
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.core.results import EVALUATION, accuracy
from treadle.data.problems import Problems
from treadle.data.records import Preference, Problem
from treadle.data.split import LeakFreeSplit
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="al.iterative",
    paper="Xiong et al. 2023, arXiv:2312.11456",
    summary="Rounds of sampling, labels by verifier, model or person, and training; resumable.",
    recipe="treadle run iterate",
    oracle="tests/alignment/test_alignment_iterate.py::test_win_rates_rise_and_a_run_goes_on",
)
PAIRS = "pairs.jsonl"
SLOTS = 32


class PairsOf(Pairs, Reads):
    """The labelled pairs that an earlier step wrote."""

    def resolve(self, workspace: Workspace | None) -> Pairs:
        if workspace is None:
            raise TreadleError(f"PairsOf(step={self.step}): there are steps in pipelines alone")
        whole = LeakFreeSplit(validation=0, test=0)
        return PairFiles(path=str(workspace.output(self.step) / PAIRS), parts=whole)

    def pair(self, index: int) -> Preference:
        raise TreadleError(f"PairsOf(step={self.step}): not resolved")

    def count(self) -> int:
        raise TreadleError(f"PairsOf(step={self.step}): not resolved")


class Pairing(Config):
    """A shape: which of several answers to a problem are compared."""

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs of them."""


class Neighbours(Pairing):
    """The first with the second, the third with the fourth: each answer once."""

    def __call__(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        return list(zip(texts[::2], texts[1::2], strict=False))


class EveryPair(Pairing):
    """Each answer with all others."""

    def __call__(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        return list(combinations(texts, 2))


class Compare(Step):
    """Pairs of answers of one model, labelled; ties are left out."""

    model: ModelSource
    problems: Problems
    count: int = Field(64, ge=1)
    """Problems."""
    first: int = Field(0, ge=0)
    """Number of the first problem; rounds take different ones."""
    completions: int = Field(4, ge=2)
    """Answers to each problem."""
    pairing: Pairing = Neighbours()
    sampling: Sampling = Sampling(max_tokens=112)
    labeller: Labeller = ByMarks()
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        problems = [self.problems.problem(self.first + i) for i in range(self.count)]
        draw = partial(sampled, self.sampling, self.precision, workspace)
        answers = draw(self.model, problems, self.completions)
        pairs = [
            Comparison(problem, a, b)
            for problem, texts in zip(problems, answers.texts, strict=True)
            for a, b in self.pairing(texts)
        ]
        comparisons = [c for c in pairs if different(c.first, c.second)]
        verdicts = self.labeller(comparisons, self.problems, workspace)
        rows = [
            _row(c, v)
            for c, v in zip(comparisons, verdicts, strict=True)
            if not math.isclose(v.first_better, 0.5)
        ]
        if not rows:
            why = next((f" ({v.failure})" for v in verdicts if v.failure), "")
            raise TreadleError(
                f"{self.name}: none of {len(comparisons)} comparisons was decided{why}: sample "
                "hotter, take more problems, or another labeller"
            )
        write_text(workspace.folder / PAIRS, "".join(json.dumps(r) + "\n" for r in rows))
        return {
            "kind": "comparisons",
            "compared": len(comparisons),
            "decided": len(rows),
            "same_or_empty": len(pairs) - len(comparisons),
            "prompts_too_long": answers.too_long,
            **judged(verdicts),
        }


class WinRate(Step):
    """How often a model's answers are found better than another's; a tie counts half."""

    model: ModelSource
    against: ModelSource
    subject: str
    """The stage that is measured."""
    problems: Problems
    count: int = Field(64, ge=1)
    sampling: Sampling = Sampling(max_tokens=112)
    labeller: Labeller = ByMarks()
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        problems = [self.problems.problem(i) for i in range(self.count)]
        draw = partial(sampled, self.sampling, self.precision, workspace)
        mine = draw(self.model, problems, 1, "mine")
        theirs = draw(self.against, problems, 1, "theirs")
        comparisons = [
            Comparison(problem, a, b)
            for problem, (a,), (b,) in zip(problems, mine.texts, theirs.texts, strict=True)
        ]
        verdicts = self.labeller(comparisons, self.problems, workspace)
        wins = [decided(v) for v in verdicts]
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": {"win rate": accuracy(wins)},
            "tokens_per_second": None,
            "size_bytes": None,
            "prompts_too_long": max(mine.too_long, theirs.too_long),
            **judged(verdicts),
        }


@dataclass(frozen=True)
class Answers:
    """What a model said to each of several problems."""

    texts: list[list[str]]
    too_long: int
    """Problems whose prompt fills the context; their answers are empty."""


def sampled(
    sampling: Sampling,
    precision: Precision,
    workspace: Workspace,
    source: ModelSource,
    problems: Sequence[Problem],
    completions: int,
    what: str = "answers",
) -> Answers:
    """So many completions for each problem, kept in `what`.json: labels of an interrupted step
    stay labels of what they were given for."""
    path = workspace.folder / f"{what}.json"
    if not path.is_file():
        thinker = opened_thinker(source, workspace, precision, slots=max(SLOTS, completions))
        asks = [Ask(i, tuple(m.plain() for m in p.prompt)) for i, p in enumerate(problems)]
        found = [[c.text for c in row] for row in thinker.ask(asks, sampling, completions)]
        write_json(path, {"texts": found, "too_long": thinker.overflows})
    return Answers(**json.loads(path.read_text(encoding="utf-8")))


def opened_thinker(
    source: ModelSource, workspace: Workspace, precision: Precision, slots: int = SLOTS
) -> Thinker:
    """A model that is asked for whole texts."""
    opened, precision = source.open(workspace), precision.resolve("cpu")
    model = opened.model.eval().requires_grad_(False)
    precision.prepare(model)
    config, autocast = EngineConfig(slots=slots), partial(precision.autocast, "cpu")
    engine = Engine(model, tokenizer_of(opened), config, autocast=autocast)
    return Thinker(engine, extract=lambda text: text, progress=workspace.progress)


def different(first: str, second: str) -> bool:
    """Whether both say something, and not the same."""
    return bool(first.strip() and second.strip()) and first.strip() != second.strip()


def judged(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How many comparisons got no verdict, and the mean log-odds that the first place gave, where
    that was measured."""
    found = [v.bias for v in verdicts if v.bias is not None]
    bias = {"position_bias": sum(found) / len(found)} if found else {}
    return {"verdicts_failed": float(sum(bool(v.failure) for v in verdicts)), **bias}


def _row(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    first = verdict.first_better > 0.5
    chosen, rejected = (
        (comparison.first, comparison.second) if first else (comparison.second, comparison.first)
    )
    return {
        "prompt": [m.plain() for m in comparison.problem.prompt],
        "chosen": chosen,
        "rejected": rejected,
        "confidence": verdict.first_better if first else 1 - verdict.first_better,
    }
