"""Rejection sampling: the model learns from those of its own answers that a verifier accepts.

    D = {(x, y) : y ~ pi(.|x), accepted(x, y)},    L = - sum_D log pi(y|x)

    accepted    r(x, y) >= threshold                                    RFT, STaR
                y comes to the answer that most samples of x come to    self-consistency training

Sampling anew from the trained model each round is expert iteration; one round alone is
rejection-sampling fine-tuning (RFT, Yuan et al. 2023, arXiv:2308.01825). With a hint it is STaR
(Zelikman et al. 2022, arXiv:2203.14465): problems that were not solved are asked again with their
answer, and a solution found so is learned as an answer to the question without it.
The objective is `CausalLM`.

A vote needs no verifier (Huang et al. 2022, arXiv:2210.11610): what a model rarely gets right alone
it learns where the right answer is still its most frequent one, and only there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from treadle.alignment.on_policy import shared
from treadle.alignment.rollouts import Group, Rollouts, prompt_tokens
from treadle.alignment.trees import Tree, assemble_trees, tree_size
from treadle.alignment.verifiers import extract_answer
from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, within_budget
from treadle.data.records import Problem
from treadle.data.source import Env, Source, Stream, Work
from treadle.inference.reasoning.strategy import visible
from treadle.inference.reasoning.votes import elect

CARDS = (
    Card(
        id="al.rft",
        paper="Yuan et al. 2023, RFT, arXiv:2308.01825; Zelikman et al. 2022, STaR, "
        "arXiv:2203.14465",
        summary="Rejection sampling, expert iteration and STaR: only accepted samples are trained.",
        recipe="treadle run expert-iteration",
        oracle="tests/alignment/test_alignment_accepted.py::test_only_accepted_samples_are_trained",
    ),
    Card(
        id="re.train.self_consistency",
        paper="Huang et al. 2022, Large Language Models Can Self-Improve, arXiv:2210.11610",
        summary="Learns the chains that come to the answer most samples come to; no verifier.",
        recipe="treadle run self-consistency",
        oracle="tests/alignment/test_alignment_accepted.py::test_the_majority_is_learned",
    ),
)
REDRAWS = 8
"""Rounds in a row that may accept nothing."""


class Hint(Config):
    """How a problem that was not solved is put again."""

    text: str = "{question}\n(The answer is {answer}. Show the way to it.)"


class Acceptance(Config):
    """A shape: which of a group's completions are learned."""

    @abstractmethod
    def __call__(self, group: Group) -> list[bool]:
        """For each completion whether it is accepted."""


class Rewarded(Acceptance):
    """Those of enough reward."""

    threshold: float = 1.0

    def __call__(self, group: Group) -> list[bool]:
        return [not s.failure and s.value >= self.threshold for s in group.scores]


class Agreeing(Acceptance):
    """Those that come to the answer of the majority, where it is large enough."""

    share: float = Field(0.5, gt=0.0, le=1.0)
    """Least share of the group that comes to it."""

    def __call__(self, group: Group) -> list[bool]:
        answers = [extract_answer(visible(c.text)) for c in group.completions]
        elected = answers[elect(answers, [1.0] * len(answers))]
        enough = elected is not None and answers.count(elected) >= self.share * len(answers)
        return [enough and answer == elected for answer in answers]


class Accepted(Source):
    """Accepted answers of the model in training."""

    rollouts: Rollouts
    """What is sampled in a round: its prompts, completions, sampling and reward."""
    accept: Acceptance = Rewarded()
    keep: int = Field(2, ge=1)
    """Different accepted answers that are learned for each problem at the most."""
    per_step: int = Field(8, ge=1)
    """Problems in an optimiser step, over all ranks."""
    passes: int = Field(1, ge=1)
    """Times that a round's answers are learned before the next round."""
    hint: Hint | None = None
    rounds: int | None = Field(None, ge=1)
    """After so many rounds nothing is sampled any more and the last answers are repeated."""

    def open(self, env: Env) -> AcceptedStream:
        return AcceptedStream(self, env)


class AcceptedStream(Stream):
    """Its state holds the answers that wait to be learned."""

    def __init__(self, config: Accepted, env: Env) -> None:
        self.config, self.env = config, env
        self.rollouts = config.rollouts.open(env)
        self.share = shared(config, "per_step", config.per_step, env)
        self.last: list[list[list[int]]] = []
        """The trees of this round: a prompt and its answers, as tokens."""
        self.place, self.round = 0, 0
        self.metrics: dict[str, float] = {}

    def __next__(self) -> Work:
        if self.place >= len(self.last) * self.config.passes:
            self._next_round()
        end = min(self.place + self.share, len(self.last) * self.config.passes)
        trees = [_tree(self.last[i % len(self.last)]) for i in range(self.place, end)]
        self.place = end
        runs = within_budget([tree_size(t) for t in trees], self.config.rollouts.tokens)
        batches = tuple(assemble_trees([trees[i] for i in run]) for run in runs)
        return Work(batches, {**self.metrics, "round": float(self.round)})

    def _next_round(self) -> None:
        self.place = 0
        if self.round == self.config.rounds:
            return
        for _ in range(REDRAWS):
            groups = self.rollouts.roll()
            found = [self._accepted(g) for g in groups]
            hinted = self._hinted([g for g, row in zip(groups, found, strict=True) if not row])
            self.last = [row for row in found if row] + hinted
            rewards = [r for g in groups for r in g.rewards]
            taken = [yes for g in groups for yes in self.config.accept(g)]
            right = sum(r for r, yes in zip(rewards, taken, strict=True) if yes)
            self.metrics = {
                "reward": sum(rewards) / len(rewards),
                "accepted": sum(taken) / len(taken),
                "accepted_reward": right / max(sum(taken), 1),
                "solved": sum(map(bool, found)) / len(groups),
                "hinted": len(hinted) / len(groups),
            }
            if self.last:
                self.round += 1
                return
        raise TreadleError(
            f"no answer was accepted by {type(self.config.accept).__name__} in {REDRAWS} rounds of "
            f"{self.config.rollouts.prompts} problems: choose easier ones, sample more, give a "
            "hint, or train on solutions first"
        )

    def _accepted(self, group: Group) -> list[list[int]]:
        """The prompt and its different accepted answers; nothing where there are none."""
        answers = dict.fromkeys(
            c.tokens
            for c, yes in zip(group.completions, self.config.accept(group), strict=True)
            if yes and c.finish == "stop" and c.tokens
        )
        kept = [list(tokens) for tokens in answers][: self.config.keep]
        return [list(group.prompt), *kept] if kept else []

    def _hinted(self, failed: Sequence[Group]) -> list[list[list[int]]]:
        if self.config.hint is None or not failed:
            return []
        start = self.rollouts.drawn
        asked = [with_hint(g.problem, self.config.hint) for g in failed]
        groups = self.rollouts.complete((p, start + i) for i, p in enumerate(asked))
        by_problem = {id(g.problem): g for g in groups}
        rows = []
        for problem, original in zip(asked, failed, strict=True):
            row = self._accepted(by_problem[id(problem)]) if id(problem) in by_problem else []
            if row:
                rows.append([list(prompt_tokens(self.env, original.problem)), *row[1:]])
        return rows

    def state(self) -> dict[str, Any]:
        return {
            "rollouts": self.rollouts.state(),
            "last": self.last,
            "place": self.place,
            "round": self.round,
            "metrics": self.metrics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rollouts.restore(state["rollouts"])
        self.last = [[list(ids) for ids in row] for row in state["last"]]
        self.place, self.round = int(state["place"]), int(state["round"])
        self.metrics = dict(state["metrics"])


def with_hint(problem: Problem, hint: Hint) -> Problem:
    """The problem with its answer told in the question; it is verified as before."""
    last = problem.prompt[-1]
    text = hint.text.replace("{question}", last.content).replace("{answer}", problem.answer)
    return replace(problem, prompt=(*problem.prompt[:-1], replace(last, content=text)))


def _tree(row: Sequence[Sequence[int]]) -> Tree:
    prompt, *answers = row
    return [
        Piece(prompt, [False] * len(prompt)),
        *(Piece(ids, [True] * len(ids), parent=0) for ids in answers),
    ]
