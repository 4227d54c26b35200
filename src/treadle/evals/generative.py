"""Generation: the model writes, an extraction finds the answer, and it is compared."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.core.config import Config
from treadle.core.results import Figure
from treadle.evals.task import Benchmark, Done, Item, Record, Subject, shares
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.tokenizers.tokenizer import Tokenizer

WAVES = 4
"""Requests that the engine gets at once, in slots; records are written after each lot."""


class Prompting(Config):
    """A shape: a prompt's text to tokens."""

    @abstractmethod
    def __call__(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of the prompt."""


class PlainPrompt(Prompting):
    """The text as it is, for base models."""

    def __call__(self, tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special=True)


class ChatPrompt(Prompting):
    """The text as what the user says, by the tokenizer's chat template."""

    def __call__(self, tokenizer: Tokenizer, text: str) -> list[int]:
        turn = {"role": "user", "content": text}
        return tokenizer.encode(tokenizer.render([turn], add_generation_prompt=True))


class Extraction(Config):
    """What counts as the answer in a text: a match of a pattern.

    With groups in the pattern, the first of them that is not empty counts.
    """

    name: str
    pattern: str
    match: int = 0
    """Which of several matches: 0 is the first, -1 the last."""

    def __call__(self, text: str) -> str | None:
        found = [next((g for g in m.groups() if g), m[0]) for m in re.finditer(self.pattern, text)]
        inside = -len(found) <= self.match < len(found)
        return found[self.match].strip() if inside else None


@dataclass(frozen=True)
class OpenItem(Item):
    """A prompt, and what is known about its answer."""

    prompt: str
    target: str


class Generative(Benchmark):
    """A shape: a benchmark that the model answers in its own words."""

    prompting: Prompting = PlainPrompt()
    sampling: Sampling = Sampling(temperature=0.0)

    @abstractmethod
    def marks(self, item: OpenItem, text: str) -> Mapping[str, float]:
        """Metrics of one answer."""

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        engine = Engine(subject.model, subject.tokenizer, subject.engine, autocast=subject.autocast)
        asked = [item for item in items if isinstance(item, OpenItem)]
        lot = WAVES * subject.engine.slots
        for first in range(0, len(asked), lot):
            part = asked[first : first + lot]
            answers = engine.generate([self._request(subject.tokenizer, i) for i in part])
            for item, (answer,) in zip(part, answers, strict=True):
                output = {
                    "text": answer.text,
                    "finish": answer.finish,
                    "tokens": len(answer.tokens),
                }
                done(item, Record(output, dict(self.marks(item, answer.text))))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return shares(records)

    def _request(self, tokenizer: Tokenizer, item: OpenItem) -> Request:
        seeded = self.sampling.replace(seed=self.sampling.seed + item.index)
        return Request(tuple(self.prompting(tokenizer, item.prompt)), seeded)
