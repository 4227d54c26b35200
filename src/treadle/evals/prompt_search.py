"""Prompt search: by which prompt does a model answer best?

The user's candidates and those that the model proposes are tried on the same problems; the better
half goes on to twice as many fresh ones, until one is left (successive halving, Jamieson and
Talwalkar 2016, arXiv:1502.07943). The winner of many looks better than it is, so it sits a
held-out exam beside the first candidate.

Instructions read off solved problems: Zhou et al. 2022, APE, arXiv:2211.01910. A model's own right
answers as examples: Khattab et al. 2023, DSPy, arXiv:2310.03714.
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import Field

from treadle.alignment.verifiers import extract_answer
from treadle.core.cards import Card
from treadle.core.config import Config, dump
from treadle.core.files import write_json
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import REASONING
from treadle.data.problems import Problems
from treadle.data.rating import Scored, require_sound, scorer
from treadle.data.records import Problem
from treadle.data.source import Env
from treadle.evals.evaluate import Exam
from treadle.evals.reason import ANSWERS, sit, turns_of
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.reasoning.prompting import (
    GREEDY,
    ChainOfThought,
    FewShot,
    Instructed,
    OneAnswer,
    Prompt,
    SelfAsk,
    Shot,
    ZeroShot,
)
from treadle.inference.reasoning.strategy import Ask, Thinker, visible
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="re.prompting.search",
    paper="Zhou et al. 2022, APE, arXiv:2211.01910; Jamieson and Talwalkar 2016, arXiv:1502.07943",
    summary="Searches for the prompt by which a model answers best, its own proposals among them.",
    recipe="treadle run prompt-search",
    oracle="tests/evals/test_evals_prompt_search.py::test_halving_keeps_the_better_half",
)
PROMPTS = "prompts.json"
Rate = Callable[[Sequence[Prompt], range], list[list[float]]]
"""Scores of prompts (rows) on the problems of these numbers (columns)."""


class Proposer(Config):
    """A shape: prompts made of problems that are not searched on."""

    @abstractmethod
    def __call__(
        self, thinker: Thinker, problems: Sequence[Problem], score: Callable[[Problem, str], Scored]
    ) -> list[Prompt]:
        """Candidates; none where nothing came of it."""


class Induced(Proposer):
    """Instructions that the model reads off answered problems: by the answers that the problems
    state where their verifier takes them as they are, else by right ones of its own."""

    count: int = Field(8, ge=1)
    shown: int = Field(4, ge=1)
    """Answered problems that are shown for each."""
    tries: int = Field(4, ge=1)
    """Answers of its own to a problem without a stated one."""
    sampling: Sampling = Sampling(temperature=1.0, max_tokens=60)
    ask: str = (
        "Here are questions and their right answers.\n\n{examples}\n\nWrite one sentence that "
        "tells somebody how to answer such questions. Give the sentence only."
    )

    def __call__(
        self, thinker: Thinker, problems: Sequence[Problem], score: Callable[[Problem, str], Scored]
    ) -> list[Prompt]:
        known = stated(problems, score) or answered(
            thinker, problems, score, self.tries, self.sampling
        )
        if not known:
            return []
        draw = random.Random(self.sampling.seed)
        asks: list[Ask] = []
        for _ in range(self.count):
            chosen = draw.sample(known, min(self.shown, len(known)))
            examples = "\n\n".join(f"{shot.question}\n{shot.answer}" for shot in chosen)
            text = self.ask.replace("{examples}", examples)
            asks.append(Ask(len(asks), ({"role": "user", "content": text},)))
        said = [visible(c.text) for (c,) in thinker.ask(asks, self.sampling)]
        lines = [" ".join(text.split()).strip('"') for text in said]
        return [Instructed(instruction=line) for line in dict.fromkeys(lines) if line]


class OwnShots(Proposer):
    """The model's own right answers as examples."""

    count: int = Field(4, ge=1)
    shots: int = Field(3, ge=1)
    """Examples of each."""
    tries: int = Field(4, ge=1)
    """Answers to each problem, of which right ones are taken."""
    sampling: Sampling = Sampling(temperature=0.7, max_tokens=192)

    def __call__(
        self, thinker: Thinker, problems: Sequence[Problem], score: Callable[[Problem, str], Scored]
    ) -> list[Prompt]:
        right = answered(thinker, problems, score, self.tries, self.sampling)
        draw = random.Random(self.sampling.seed)
        size = min(self.shots, len(right))
        found = [FewShot(shots=tuple(draw.sample(right, size))) for _ in range(self.count) if size]
        return list(dict.fromkeys(found))


def stated(problems: Sequence[Problem], score: Callable[[Problem, str], Scored]) -> list[Shot]:
    """Problems with the answers that they state, as far as the verifier takes them: of some
    families it is no answer that they keep but what answers are checked by."""
    shots = []
    for problem in problems:
        for text in (problem.answer, f"Answer: {problem.answer}"):
            if score(problem, text).value >= 1.0:
                shots.append(Shot(question=problem.prompt[-1].content, answer=text))
                break
    return shots


def answered(
    thinker: Thinker,
    problems: Sequence[Problem],
    score: Callable[[Problem, str], Scored],
    tries: int,
    sampling: Sampling,
) -> list[Shot]:
    """Problems that the model itself answers right, each with the shortest right answer."""
    asks = [Ask(i, turns_of(problem)) for i, problem in enumerate(problems)]
    right = []
    for problem, row in zip(problems, thinker.ask(asks, sampling, tries), strict=True):
        texts = [visible(c.text).strip() for c in row]
        if good := [t for t in texts if t and score(problem, t).value >= 1.0]:
            right.append(Shot(question=problem.prompt[-1].content, answer=min(good, key=len)))
    return right


@dataclass
class Tried:
    """A candidate, and its scores on the problems that it was put."""

    prompt: Prompt
    scores: list[float] = field(default_factory=list)
    rounds: int = 0

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def halving(candidates: Sequence[Prompt], rate: Rate, first: int, begin: int = 0) -> list[Tried]:
    """All candidates, the best first: those of later rounds before those of earlier ones, then by
    their mean; of two alike the one named first is better.

    Args:
        first: problems of the first round; each further round has twice as many.
        begin: number of the first problem.
    """
    tried = [Tried(prompt) for prompt in candidates]
    going, size = list(tried), first
    while True:
        rows = rate([t.prompt for t in going], range(begin, begin + size))
        for one, scores in zip(going, rows, strict=True):
            one.scores += scores
            one.rounds += 1
        going = sorted(going, key=lambda t: -t.mean)[: (len(going) + 1) // 2]
        if len(going) == 1:
            return sorted(tried, key=lambda t: (-t.rounds, -t.mean))
        begin, size = begin + size, 2 * size


class SearchPrompts(Step):
    """Find a prompt, and sit an exam with it."""

    model: ModelSource
    problems: Problems
    """What is searched on: the first `examples` of them for proposals, those after them for the
    rounds."""
    exam: Exam
    """Held-out problems, for the first candidate and the winner."""
    candidates: tuple[Prompt, ...] = Field((ZeroShot(), ChainOfThought(), SelfAsk()), min_length=1)
    proposers: tuple[Proposer, ...] = (Induced(), OwnShots())
    examples: int = Field(16, ge=1)
    first: int = Field(16, ge=1)
    """Problems of the first round."""
    sampling: Sampling = GREEDY
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which a verifier is given up."""
    precision: Precision = Auto()
    engine: EngineConfig = EngineConfig()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened, precision = self.model.open(workspace), self.precision.resolve("cpu")
        model, tokenizer = opened.model.eval().requires_grad_(False), tokenizer_of(opened)
        precision.prepare(model)
        engine = Engine(model, tokenizer, self.engine, autocast=partial(precision.autocast, "cpu"))
        thinker = Thinker(engine, extract_answer, progress=workspace.progress)
        score = scorer(self.problems, self.patience)
        solved = [self.problems.problem(i) for i in range(self.examples)]
        proposed = [p for proposer in self.proposers for p in proposer(thinker, solved, score)]
        candidates = list(dict.fromkeys([*self.candidates, *proposed]))
        rate = partial(self._rate, thinker, score)
        tried = halving(candidates, rate, self.first, begin=self.examples)
        write_json(workspace.folder / PROMPTS, [row_of(t) for t in tried])
        best = tried[0].prompt
        strategy = OneAnswer(prompt=best, sampling=self.sampling)
        workspace.progress.say(f"{self.name}: --strategy '{json.dumps(dump(strategy))}'")
        env = Env(model, tokenizer, workspace.folder, workspace=workspace)
        plain = OneAnswer(prompt=candidates[0], sampling=self.sampling)
        sat = [
            sit(engine, s, self.exam, env, workspace.progress)
            for s in dict.fromkeys((plain, strategy))
        ]
        write_json(workspace.folder / ANSWERS, [answer for _, said in sat for answer in said])
        return {
            "kind": REASONING,
            "rows": [row for row, _ in sat],
            "tried": len(candidates),
            "proposed": len(proposed),
            "tokens_spent": sum(thinker.spent.values()),
            "best": json.dumps(dump(best)),
        }

    def _rate(
        self,
        thinker: Thinker,
        score: Callable[[Problem, str], Scored],
        prompts: Sequence[Prompt],
        numbers: range,
    ) -> list[list[float]]:
        """All at once, so that the engine computes them together."""
        problems = [self.problems.problem(i) for i in numbers]
        turns = [turns_of(problem) for problem in problems]
        asks = [Ask(i, *prompt(talk)) for prompt in prompts for i, talk in enumerate(turns)]
        found = [
            score(problems[ask.question], visible(ask.prefix + c.text))
            for ask, (c,) in zip(asks, thinker.ask(asks, self.sampling), strict=True)
        ]
        require_sound(found)
        values, size = [s.value for s in found], len(problems)
        return [values[i : i + size] for i in range(0, len(values), size)]


def row_of(tried: Tried) -> dict[str, Any]:
    return {
        "prompt": dump(tried.prompt),
        "mean": tried.mean,
        "problems": len(tried.scores),
        "rounds": tried.rounds,
    }
