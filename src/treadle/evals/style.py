"""Style, measured: a classifier of short letter sequences that learned ways to write.

    log p(x | c) = sum over known n-grams g of x, n <= N, of  log p(g | c)
    p(g | c) = (count_c(g) + 1) / (total_c + distinct n-grams)
    score = 1 where p(x | styled) > p(x | c) for each other way c

The other ways are the plain answers, and the questions: prose that is no answer at all. Without
them whatever is no plain answer would pass for the style.

Naive Bayes over characters, as for telling authors apart (Peng et al. 2003). It reads how
something is said; what is said is compared apart, by the words of the right answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from pydantic import Field

from treadle.core.errors import ConfigError
from treadle.data.persona import told_who
from treadle.data.problems import Problems
from treadle.data.records import Chat, Problem
from treadle.data.supervised import Conversations


@dataclass(frozen=True)
class StyleClassifier:
    """For each other way to write, the log odds of every n-gram seen."""

    odds: tuple[Mapping[str, float], ...]
    order: int

    def __call__(self, text: str) -> float:
        """Log odds for the style against the likeliest other way; 0 where nothing is said."""
        found = grams(text, self.order)
        return min(sum(odds.get(gram, 0.0) for gram in found) for odds in self.odds)


def learn_style(styled: Iterable[str], *others: Iterable[str], order: int = 3) -> StyleClassifier:
    """A classifier from texts of the style and of each other way to write.

    Raises:
        ConfigError: one of them has no text.
    """
    ways = (styled, *others)
    style, *rest = (Counter(g for text in texts for g in grams(text, order)) for texts in ways)
    if not all((style, *rest)):
        raise ConfigError("a style is learned from texts of each kind; one of them has none")
    known = frozenset().union(style, *rest)

    def odds(other: Counter[str]) -> dict[str, float]:
        scale = math.log((other.total() + len(known)) / (style.total() + len(known)))
        return {g: math.log((style[g] + 1) / (other[g] + 1)) + scale for g in known}

    return StyleClassifier(tuple(map(odds, rest)), order)


def grams(text: str, order: int) -> list[str]:
    """All runs of up to `order` characters, small letters only."""
    low = " ".join(text.lower().split())
    return [low[i : i + n] for n in range(1, order + 1) for i in range(len(low) - n + 1)]


class StyleProblems(Problems):
    """Questions whose answers are scored by how they are said.

    The classifier learns from the first `known` conversations of both kinds; asked are those after.
    """

    styled: Conversations
    plain: Conversations
    who: str = ""
    """The system message; empty: nobody is told who speaks."""
    known: int = Field(200, ge=1)
    order: int = Field(3, ge=1)

    def problem(self, index: int) -> Problem:
        """Problem number `index`, from 0.

        Raises:
            ConfigError: there are not so many conversations.
        """
        _require(self.styled, self.known + index + 1)
        chat = self.styled.conversation(self.known + index)
        if self.who:
            chat = told_who(chat, self.who)
        *asked, last = chat.messages
        return Problem(tuple(asked), last.content, "style")

    def score(self, problem: Problem, completion: str) -> float:
        return float(_classifier(self)(completion) > 0)


class ContentProblems(Problems):
    """The same questions, scored by the share of the right answer's words that are said."""

    style: StyleProblems
    ignored: tuple[str, ...] = ()
    """Words of the style itself, which carry no content."""

    def problem(self, index: int) -> Problem:
        return replace(self.style.problem(index), verifier="content")

    def score(self, problem: Problem, completion: str) -> float:
        wanted = words(problem.answer) - frozenset(self.ignored)
        return len(wanted & words(completion)) / len(wanted) if wanted else 1.0


def words(text: str) -> frozenset[str]:
    """The words of a text, small, without marks."""
    return frozenset(word for part in text.lower().split() if (word := part.strip(".,;:!?\"'()*")))


@lru_cache(maxsize=4)
def _classifier(problems: StyleProblems) -> StyleClassifier:
    def chats(conversations: Conversations) -> list[Chat]:
        _require(conversations, problems.known)
        return [conversations.conversation(i) for i in range(problems.known)]

    styled, plain = chats(problems.styled), chats(problems.plain)
    asked = [m.content for chat in plain for m in chat.messages if m.role == "user"]
    return learn_style(map(answer, styled), map(answer, plain), asked, order=problems.order)


def _require(conversations: Conversations, wanted: int) -> None:
    there = conversations.count()
    if there is not None and there < wanted:
        raise ConfigError(
            f"StyleProblems: {wanted} conversations of {type(conversations).__name__} are needed, "
            f"to learn the style and to ask about it, but there are {there}; lower `known`, or ask "
            "fewer problems"
        )


def answer(chat: Chat) -> str:
    """What the assistant says last."""
    return chat.messages[-1].content
