"""Learning to check solutions: the model's own answers, with what a verifier says of them.

    verification    (question, attempt, "Is it right?") -> "Yes." or "No."
    critique        (question, attempt, "Check it.")    -> the first wrong step, or "No mistakes."
                    (..., critique, "Write it again.")  -> a right solution

Attempts are sampled from the model in training; in lessons they are read and not learned. Right
ones are learned besides, as answers: a model that learns verdicts alone forgets how to solve, and
soon has nothing right to tell from the wrong (measured: 17% right answers became none in nine
steps). Cobbe et al. 2021, arXiv:2110.14168, and Zhang et al. 2024, GenRM, arXiv:2408.15240
(verification as words, beside solutions); Saunders et al. 2022, arXiv:2206.05802 (critiques). The
objective is `CausalLM`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pydantic import Field

from treadle.alignment.on_policy import shared
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.worked_solutions import worked_solution
from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble, within_budget
from treadle.data.records import Chat, Message, Problem, assistant, user
from treadle.data.source import Env, Source, Stream, Work
from treadle.inference.reasoning.critique import CritiqueAndRefine
from treadle.inference.reasoning.strategy import visible
from treadle.inference.reasoning.verdict import ASK, NO, YES
from treadle.tokenizers.chat import LastTurn, encode_chat

CARDS = (
    Card(
        id="re.critique.verification",
        paper="Cobbe et al. 2021, arXiv:2110.14168; Zhang et al. 2024, GenRM, arXiv:2408.15240",
        summary="Learns to tell its right answers from its wrong ones, for best-of-N by its word.",
        recipe="treadle run verification",
        oracle="tests/alignment/test_alignment_reviewed.py::test_verdicts_are_the_verifiers",
    ),
    Card(
        id="re.critique.training",
        paper="Saunders et al. 2022, Self-critiquing models, arXiv:2206.05802",
        summary="Learns to name the first mistake of its own answers and to write them anew.",
        recipe="treadle run critique",
        oracle="tests/alignment/test_alignment_reviewed.py::test_critiques_name_the_first_mistake",
    ),
)
REDRAWS = 8
"""Rounds in a row that may give nothing to learn."""


class Lesson(Config):
    """A shape: what is learned from an attempt at a problem."""

    @abstractmethod
    def __call__(self, problem: Problem, attempt: str, *, right: bool) -> tuple[Chat, ...]:
        """Conversations whose last turns are learned."""


class LearnVerdict(Lesson):
    """Whether the attempt is right, as `ByVerdict` asks for it."""

    ask: str = ASK

    def __call__(self, problem: Problem, attempt: str, *, right: bool) -> tuple[Chat, ...]:
        said = (*problem.prompt, assistant(visible(attempt)), user(self.ask))
        return (Chat((*said, assistant(YES if right else NO))),)


class LearnCritique(Lesson):
    """The first mistake and a right solution, as `CritiqueAndRefine` asks for them.

    Problems must have worked solutions: a mistake is where the attempt first leaves them.
    """

    strategy: CritiqueAndRefine = CritiqueAndRefine()

    def __call__(self, problem: Problem, attempt: str, *, right: bool) -> tuple[Chat, ...]:
        said = (*problem.prompt, assistant(visible(attempt)), user(self.strategy.critique))
        if right:
            return (Chat((*said, assistant("No mistakes."))),)
        solution = worked_solution(problem)
        found = assistant(first_mistake(visible(attempt), solution))
        refined: tuple[Message, ...] = (user(self.strategy.refine), assistant(solution))
        return Chat((*said, found)), Chat((*said, found, *refined))


def first_mistake(attempt: str, solution: str) -> str:
    """Which line of an attempt is the first that a right solution has otherwise."""
    lines = ([line.strip() for line in text.strip().splitlines()] for text in (attempt, solution))
    for number, (said, right) in enumerate(zip_longest(*lines), 1):
        if said == right:
            continue
        if said is None:
            return f"Line {number} is missing: {right}"
        if right is None:
            return f"Line {number} is too much: {said}"
        return f"Line {number} is wrong: {said}\nRight is: {right}"
    return "The steps are right, but not what is made of them."


class Reviewed(Source):
    """Lessons from answers that the model in training gives."""

    rollouts: Rollouts
    """What is sampled in a round: its prompts, completions, sampling and reward."""
    lesson: Lesson
    per_step: int = Field(32, ge=1)
    """Conversations in an optimiser step, over all ranks."""
    threshold: float = 1.0
    """Least reward of a right answer."""
    balance: bool = True
    """As many lessons from right answers as from wrong ones in each round."""
    answers: bool = True
    """Right answers are learned as such, too."""

    def open(self, env: Env) -> ReviewedStream:
        return ReviewedStream(self, env)


class ReviewedStream(Stream):
    """Its state holds the conversations that wait to be learned, as tokens."""

    def __init__(self, config: Reviewed, env: Env) -> None:
        self.config, self.env = config, env
        self.rollouts = config.rollouts.open(env)
        self.share = shared(config, "per_step", config.per_step, env)
        self.waiting: list[tuple[list[int], list[bool]]] = []
        self.metrics: dict[str, float] = {}

    def __next__(self) -> Work:
        for _ in range(REDRAWS):
            if len(self.waiting) >= self.share:
                break
            self._roll()
        if not self.waiting:
            raise TreadleError(
                f"{REDRAWS} rounds of {self.config.rollouts.prompts} problems gave only right or "
                "only wrong answers, so there is nothing to tell apart, or lessons longer than the "
                "context: choose harder, easier or shorter problems, raise the temperature, or set "
                "balance=false"
            )
        taken = self.waiting[: self.share]
        self.waiting = self.waiting[len(taken) :]
        pieces = [Piece(ids, mask) for ids, mask in taken]
        runs = within_budget([len(p.tokens) for p in pieces], self.config.rollouts.tokens)
        batches = tuple(assemble([pieces[i] for i in run]) for run in runs)
        return Work(batches, {**self.metrics, "waiting": float(len(self.waiting))})

    def _roll(self) -> None:
        found: dict[bool, dict[tuple[int, str], tuple[Chat, ...]]] = {True: {}, False: {}}
        rewards = []
        for number, group in enumerate(self.rollouts.roll()):
            for completion, scored in zip(group.completions, group.scores, strict=True):
                rewards.append(scored.value)
                right = scored.value >= self.config.threshold
                if visible(completion.text).strip() and not scored.failure:
                    found[right][number, completion.text] = self._lessons(
                        group.problem, completion.text, right
                    )
        rows = [list(found[right].values()) for right in (True, False)]
        if self.config.balance:
            rows = [row[: min(map(len, rows))] for row in rows]
        lessons = [
            self._encoded(chat)
            for pair in zip_longest(*rows, fillvalue=())
            for chats in pair
            for chat in chats
        ]
        context = self.env.model.config.context
        fitting = [(ids, mask) for ids, mask in lessons if len(ids) <= context]
        self.waiting += fitting
        self.metrics = {
            "reward": sum(rewards) / len(rewards),
            "right_answers": float(len(rows[0])),
            "wrong_answers": float(len(rows[1])),
            "lessons_too_long": float(len(lessons) - len(fitting)),
        }

    def _lessons(self, problem: Problem, attempt: str, right: bool) -> tuple[Chat, ...]:
        chats = self.config.lesson(problem, attempt, right=right)
        if right and self.config.answers:
            return (*chats, Chat((*problem.prompt, assistant(attempt))))
        return chats

    def _encoded(self, chat: Chat) -> tuple[list[int], list[bool]]:
        messages = [m.plain() for m in chat.messages]
        encoded = encode_chat(self.env.tokenizer, messages, turns=LastTurn())
        return list(encoded.ids), list(encoded.mask)

    def state(self) -> dict[str, Any]:
        return {
            "rollouts": self.rollouts.state(),
            "waiting": [[ids, mask] for ids, mask in self.waiting],
            "metrics": self.metrics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rollouts.restore(state["rollouts"])
        rows: Sequence[Any] = state["waiting"]
        self.waiting = [(list(ids), list(mask)) for ids, mask in rows]
        self.metrics = dict(state["metrics"])
