"""Documents that an answer is to rest on: the passages a model sees, and what it took from them.

Of more passages than there is room for, the model sees those that score best for the question by
BM25 (`data/bm25.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from treadle.core.cards import Card
from treadle.data.bm25 import WordIndex

CARD = Card(
    id="deploy.ui.sources",
    paper="Robertson and Walker 1994, BM25; Gao et al. 2023, ALCE, arXiv:2305.14627",
    summary="Documents in a chat: the best passages are shown to the model, its answer cites them.",
    recipe="treadle serve smollm2-135m-instruct",
    oracle="tests/serving/test_serving_sources.py::test_the_best_passages_are_those_of_the_formula",
)
LONGEST = 900
"""Characters of a passage."""
WORD = re.compile(r"\w+")
SENTENCE = re.compile(r"[^\s.!?](?:[^.!?\n]|[.!?](?=[^\s\[]))*[.!?]*(?:\s*\[\d+\])*")
MARK = re.compile(r"\[(\d+)\]")
TELLING = 4
"""Letters of a word that says something about what a sentence is about."""
SHARE, LEAST = 0.6, 3
"""Of a sentence's telling words, and how many, that a passage has which it is taken from."""
ASKED = "Answer from the sources below. Behind what you take from one, write its number: [1]."


@dataclass(frozen=True)
class Passage:
    """A piece of a document."""

    number: int
    """By which an answer may cite it; from 1."""
    title: str
    text: str


@dataclass(frozen=True)
class Citation:
    """Characters of an answer that rest on a passage."""

    start: int
    end: int
    source: int
    by: Literal["mark", "words"]
    """Whether the answer names the passage, or shares most of a sentence's words with it."""


def passages(documents: Sequence[tuple[str, str]]) -> list[Passage]:
    """Titles and texts, cut at empty lines, else at ends of sentences, else anywhere."""
    cut = [(title, part) for title, text in documents for part in _parts(text)]
    return [Passage(number, *part) for number, part in enumerate(cut, 1)]


def chosen(
    given: Sequence[Passage], question: str, size: Callable[[str], int], room: int
) -> list[Passage]:
    """The passages that score best and fit together, in their order, numbered anew."""
    score, kept = scores(given, question), []
    for place in sorted(range(len(given)), key=lambda i: -score[i]):
        room -= size(given[place].text)
        if room < 0:
            break
        kept.append(place)
    return [Passage(i, given[k].title, given[k].text) for i, k in enumerate(sorted(kept), 1)]


def scores(given: Sequence[Passage], question: str) -> list[float]:
    """How well each passage, its title included, fits the question."""
    if not given:
        return []
    index = WordIndex([_words(f"{p.title} {p.text}") for p in given])
    return [float(score) for score in index.scores(_words(question))]


def shown(given: Sequence[Passage]) -> str:
    """What a model is told of them whose template knows no documents."""
    return "\n\n".join([ASKED, *(f"[{p.number}] {p.title}\n{p.text}" for p in given)])


def citations(answer: str, given: Sequence[Passage]) -> list[Citation]:
    """Sentence by sentence: the passages it names, else the one that most of its words are in."""
    words = {p.number: _telling(p.text) for p in given}
    found = []
    for sentence in SENTENCE.finditer(answer):
        start, end = sentence.span()
        named = dict.fromkeys(int(number) for number in MARK.findall(sentence[0]))
        known = [number for number in named if number in words]
        found += [Citation(start, end, number, "mark") for number in known]
        telling = _telling(sentence[0])
        if known or not telling or not words:
            continue
        source, held = max(words.items(), key=lambda item: len(telling & item[1]))
        if len(telling & held) >= max(LEAST, SHARE * len(telling)):
            found.append(Citation(start, end, source, "words"))
    return found


def told(answer: str, given: Sequence[Passage]) -> dict[str, Any]:
    """What is added to a message."""
    return {
        "sources": [asdict(passage) for passage in given],
        "citations": [asdict(citation) for citation in citations(answer, given)],
    }


def _parts(text: str) -> list[str]:
    parts = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in _pieces(paragraph.strip()):
            if len(parts[-1]) + len(piece) + 1 > LONGEST:
                parts.append("")
            parts[-1] = f"{parts[-1]}\n{piece}".strip()
    return [part for part in parts if part]


def _pieces(paragraph: str) -> list[str]:
    if len(paragraph) <= LONGEST:
        return [paragraph]
    sentences = re.split(r"(?<=[.!?])\s+", paragraph)
    return [s[i : i + LONGEST] for s in sentences for i in range(0, len(s), LONGEST)]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _telling(text: str) -> set[str]:
    return {word for word in _words(text) if len(word) >= TELLING}
