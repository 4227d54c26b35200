"""The one interface of reasoning strategies: questions in, answers and what they cost out.

A strategy gets all questions at once, so that the engine computes them together.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treadle.core.config import Config
from treadle.core.progress import Progress, Silent
from treadle.data.rating import Rating
from treadle.inference.engine import Engine
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.tokenizers.chat import encode_prompt

Turns = tuple[dict[str, str], ...]
"""A conversation as chat templates have it."""
Extract = Callable[[str], str | None]
Verify = Callable[[int, str], float]
Rate = Callable[[Rating, int, Sequence[str]], list[float]]


@dataclass(frozen=True)
class Ask:
    """A conversation to be answered, and how the answer begins."""

    question: int
    """Which question pays for it."""
    turns: Turns
    prefix: str = ""


@dataclass(frozen=True)
class Thought:
    """What came of a question."""

    text: str
    """The final text, its private reasoning included."""
    answer: str | None
    tokens: int
    """Generated for it, by all samples and steps together."""
    trace: tuple[str, ...] = ()
    """The texts on the way to it."""


@dataclass
class Thinker:
    """A model that is asked, an extraction of answers, and a count of the tokens spent."""

    engine: Engine
    extract: Extract
    verify: Verify | None = None
    """Scores a text for a question, where something can."""
    rate: Rate | None = None
    """Rates texts for a question by a reward, where questions are problems."""
    progress: Progress = field(default_factory=Silent)
    spent: dict[int, int] = field(default_factory=dict)
    overflows: int = 0
    """Conversations that filled the context and got no answer."""

    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """n continuations of each; the prompt of each is computed once."""
        requests: list[Request] = []
        places: list[int] = []
        for place, ask in enumerate(asks):
            tokenizer = self.engine.tokenizer
            prompt = encode_prompt(tokenizer, list(ask.turns))
            if ask.prefix:
                prompt = prompt + tokenizer.encode(ask.prefix, parse_special=False)
            if len(prompt) >= self.engine.runner.context:
                self.overflows += 1
                continue
            seed = sampling.seed + ask.question
            requests.append(Request(tuple(prompt), sampling.replace(seed=seed), n=n))
            places.append(place)
        nothing = Completion(tokens=(), text="", logprobs=(), finish="length")
        answers = [[nothing] * n for _ in asks]
        with self.progress.task("answers", n * len(requests)) as task:
            found = self.engine.generate(requests, lambda done, total: task.update(done))
        for place, completions in zip(places, found, strict=True):
            answers[place] = completions
            question = asks[place].question
            cost = sum(len(c.tokens) for c in completions)
            self.spent[question] = self.spent.get(question, 0) + cost
        return answers

    def thought(self, question: int, text: str, trace: Sequence[str] = ()) -> Thought:
        """The final word on a question, with all that was spent on it."""
        answer = self.extract(visible(text))
        return Thought(text, answer, self.spent.get(question, 0), tuple(trace))


class Strategy(Config):
    """A shape: a way to come to an answer."""

    @abstractmethod
    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        """A thought for each question, in order."""


THINK, END_THINK = "<think>", "</think>"
_THOUGHT = re.compile(f"{THINK}.*?(?:{END_THINK}\n*|\\Z)", re.DOTALL)


def visible(text: str) -> str:
    """A text without its private reasoning, which stands in `<think>` tags.

    What follows an opening tag that never closes is private; what precedes a closing tag without
    an opening one is too, since templates may write the opening tag themselves.
    """
    _, closed, after = _THOUGHT.sub("", text).rpartition(END_THINK)
    return after.lstrip("\n") if closed else after


def private(text: str) -> str:
    """The reasoning in `<think>` tags."""
    head, closed, _ = text.partition(END_THINK)
    _, opened, inside = head.partition(THINK)
    if opened:
        return inside.strip()
    return head.strip() if closed else ""


def said_last(turns: Turns, change: Callable[[str], str]) -> Turns:
    """The conversation with the text of its last turn changed."""
    last = {**turns[-1], "content": change(turns[-1]["content"])}
    return (*turns[:-1], last)
