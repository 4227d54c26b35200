"""Prompts that make a model reason: zero-shot, few-shot, chain of thought, self-ask, least-to-most.

zero-shot CoT    Kojima et al. 2022, arXiv:2205.11916
few-shot CoT     Wei et al. 2022, arXiv:2201.11903
self-ask         Press et al. 2022, arXiv:2210.03350
least-to-most    Zhou et al. 2022, arXiv:2205.10625
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.inference.reasoning.strategy import (
    Ask,
    Strategy,
    Thinker,
    Thought,
    Turns,
    said_last,
    visible,
)
from treadle.inference.sampling import Sampling

CARD = Card(
    id="re.prompting",
    paper="Wei et al. 2022, arXiv:2201.11903; arXiv:2205.11916; arXiv:2210.03350; arXiv:2205.10625",
    summary="Zero-shot, few-shot, chain-of-thought, self-ask and least-to-most prompts.",
    recipe="treadle reason smollm2-135m-instruct --strategy OneAnswer --strategy LeastToMost",
    oracle="tests/inference/test_inference_reasoning.py::test_prompts_are_rendered_as_specified",
)
GREEDY = Sampling(temperature=0.0, max_tokens=192)


class Prompt(Config):
    """A shape: how a question is put."""

    @abstractmethod
    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        """The conversation, and how the answer to it begins."""


class ZeroShot(Prompt):
    """The question as it is."""

    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        return turns, ""


class ChainOfThought(Prompt):
    """The answer begins with a promise to go step by step."""

    trigger: str = "Let's think step by step."

    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        return turns, f"{self.trigger}\n"


class Instructed(Prompt):
    """An instruction before the question."""

    instruction: str = Field(min_length=1)

    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        return said_last(turns, lambda question: f"{self.instruction}\n\n{question}"), ""


class Shot(Config):
    """A question with the answer that a model should imitate, reasoning included."""

    question: str
    answer: str


class FewShot(Prompt):
    """Examples as earlier turns of the conversation."""

    shots: tuple[Shot, ...] = Field(min_length=1)

    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        examples: list[dict[str, str]] = []
        for shot in self.shots:
            examples.append({"role": "user", "content": shot.question})
            examples.append({"role": "assistant", "content": shot.answer})
        system = tuple(t for t in turns[:1] if t["role"] == "system")
        return (*system, *examples, *turns[len(system) :]), ""


class SelfAsk(Prompt):
    """The answer begins with the question whether smaller ones come first."""

    def __call__(self, turns: Turns) -> tuple[Turns, str]:
        return turns, "Are follow up questions needed here: Yes.\nFollow up:"


class OneAnswer(Strategy):
    """One answer."""

    prompt: Prompt = ZeroShot()
    sampling: Sampling = GREEDY

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        asks = prompted(self.prompt, questions)
        answers = thinker.ask(asks, self.sampling)
        return [
            thinker.thought(a.question, a.prefix + c.text)
            for a, (c,) in zip(asks, answers, strict=True)
        ]


def prompted(prompt: Prompt, questions: Sequence[Turns]) -> list[Ask]:
    """The questions as the prompt puts them."""
    return [Ask(i, *prompt(turns)) for i, turns in enumerate(questions)]


class LeastToMost(Strategy):
    """First the model says which smaller questions come before; then it answers them in turn, each
    with the answers so far, and the question itself last."""

    sampling: Sampling = GREEDY
    parts: int = Field(3, ge=1)
    """Most smaller questions that are followed."""
    decompose: str = (
        "{question}\n\nDo not answer yet. Which simpler questions must be answered first? "
        "List them, one a line."
    )

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        plans = thinker.ask(
            [
                Ask(i, said_last(turns, lambda q: self.decompose.replace("{question}", q)))
                for i, turns in enumerate(questions)
            ],
            self.sampling,
        )
        parts = [listed(visible(plan.text))[: self.parts] for (plan,) in plans]
        talks: list[Turns] = [turns[:-1] for turns in questions]
        for step in range(self.parts):
            asks = [
                Ask(i, (*talks[i], {"role": "user", "content": parts[i][step]}))
                for i in range(len(questions))
                if step < len(parts[i])
            ]
            for ask, (found,) in zip(asks, thinker.ask(asks, self.sampling), strict=True):
                said = {"role": "assistant", "content": visible(found.text)}
                talks[ask.question] = (*ask.turns, said)
        last = [Ask(i, (*talk, questions[i][-1])) for i, talk in enumerate(talks)]
        answers = thinker.ask(last, self.sampling)
        return [
            thinker.thought(i, answer.text, trace=[t["content"] for t in talks[i]])
            for i, (answer,) in enumerate(answers)
        ]


_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])?\s*(.*?)\s*$")


def listed(text: str) -> list[str]:
    """Lines of a list without their bullets or numbers; introductions that end in `:` are none."""
    lines = [_BULLET.sub(r"\1", line) for line in text.splitlines()]
    return [line for line in lines if line and not line.endswith(":")]
