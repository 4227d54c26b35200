"""Text with words hidden, for encoders that learn to say which they were.

    15% of the tokens are chosen; of these 80% become [MASK], 10% another token, 10% stay

Devlin et al. 2018, arXiv:1810.04805. What is chosen follows from the seed, the place in the data
and the document alone: it is another choice each epoch, and the same after an interruption.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, within_budget
from treadle.data.documents import Documents
from treadle.data.framing import Framed, Framer, laid
from treadle.data.order import Order, Place
from treadle.data.source import Env, Source, Stream, Work


class Choice(Config):
    """A shape: which tokens of a text are to be said."""

    share: float = Field(0.15, gt=0.0, lt=1.0)
    """Of all tokens; at least one of each text."""

    @abstractmethod
    def __call__(self, words: Sequence[int], random: np.random.Generator) -> list[int]:
        """Places in ascending order; `words[i]` is the word that token i is a part of."""

    def count(self, tokens: int) -> int:
        return max(1, round(self.share * tokens))


class EachToken(Choice):
    """Every token for itself."""

    def __call__(self, words: Sequence[int], random: np.random.Generator) -> list[int]:
        return sorted(random.permutation(len(words))[: self.count(len(words))].tolist())


class WholeWords(Choice):
    """All tokens of a word or none: what is left of a word does not give it away."""

    def __call__(self, words: Sequence[int], random: np.random.Generator) -> list[int]:
        members: dict[int, list[int]] = {}
        for place, word in enumerate(words):
            members.setdefault(word, []).append(place)
        chosen: list[int] = []
        for word in random.permutation(list(members)).tolist():
            if len(chosen) >= self.count(len(words)):
                break
            chosen += members[word]
        return sorted(chosen)


@dataclass(frozen=True)
class Stretch:
    """A run of a document's tokens."""

    ids: tuple[int, ...]
    words: tuple[int, ...]


class MaskedTexts(Source):
    """Stretches of documents with some of their tokens hidden."""

    documents: Documents
    choice: Choice = WholeWords()
    mask: str = "[MASK]"
    """What the tokenizer calls the token that hides another."""
    masked: float = Field(0.8, ge=0.0, le=1.0)
    """Of the chosen tokens."""
    swapped: float = Field(0.1, ge=0.0, le=1.0)
    """Of the chosen tokens: another token stands in their place."""
    per_step: int = Field(32, ge=1)
    """Stretches in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(128, ge=4)
    """Tokens of a stretch with its frame."""

    def open(self, env: Env) -> MaskedStream:
        """The stream from its beginning.

        Raises:
            TreadleError: the tokenizer has no such token, shares exceed 1, or there is no text.
        """
        hidden = env.tokenizer.backend.token_to_id(self.mask)
        if hidden is None:
            raise TreadleError(
                f"MaskedTexts: the tokenizer has no token `{self.mask}`; name the one that hides "
                "others by source.mask, or take an encoder's tokenizer"
            )
        if self.masked + self.swapped > 1:
            raise TreadleError(
                f"MaskedTexts: masked={self.masked} and swapped={self.swapped} are more than all; "
                "lower one"
            )
        return MaskedStream(self, env, hidden)


class MaskedStream(Stream):
    """Its state is the place in the order of the stretches."""

    def __init__(self, config: MaskedTexts, env: Env, mask: int) -> None:
        self.config, self.env, self.mask = config, env, mask
        self.framer = Framer(env.tokenizer, min(config.longest, env.model.config.context))
        frame = len(self.framer.before) + len(self.framer.after)
        room = self.framer.longest - frame
        texts = (document.text for document in config.documents.training())
        self.stretches = list(stretches(texts, env, room))
        if not self.stretches:
            raise TreadleError("MaskedTexts: the documents hold no text to learn from")
        self.order, self.place = Order(len(self.stretches), env.seed), Place()

    def __next__(self) -> Work:
        config, env, place = self.config, self.env, self.place
        mine = self.order.take(place, config.per_step, rank=env.rank, world=env.world)
        self.place = self.order.after(place, config.per_step)
        found = [self.hide(self.stretches[i], (place.epoch, place.position, i)) for i in mine]
        runs = within_budget([len(framed.ids) for framed, _ in found], config.tokens)
        return Work(
            tuple(self.batch([found[i] for i in run]) for run in runs),
            {"epoch": place.epoch + place.position / self.order.size},
        )

    def hide(self, stretch: Stretch, where: tuple[int, ...]) -> tuple[Framed, list[int]]:
        """The framed stretch with tokens hidden, and what these were."""
        config, random = self.config, np.random.default_rng((self.env.seed, *where))
        ids, chosen = list(stretch.ids), config.choice(stretch.words, random)
        for place, fate in zip(chosen, random.random(len(chosen)), strict=True):
            if fate < config.masked:
                ids[place] = self.mask
            elif fate < config.masked + config.swapped:
                ids[place] = int(random.integers(self.env.model.config.vocab))
        before, after = self.framer.before, self.framer.after
        places = tuple(len(before) + place for place in chosen)
        framed = (*before, *ids, *after)
        return Framed(framed, (0,) * len(framed), places), [stretch.ids[i] for i in chosen]

    def batch(self, found: Sequence[tuple[Framed, list[int]]]) -> Batch:
        targets = torch.tensor([token for _, hidden in found for token in hidden])
        return replace(laid([framed for framed, _ in found]), targets=targets)

    def state(self) -> dict[str, Any]:
        return dict(self.place.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place = Place.restore(state)


def stretches(texts: Iterator[str], env: Env, room: int) -> Iterator[Stretch]:
    """Each text cut into runs of at most `room` tokens."""
    for text in texts:
        encoding = env.tokenizer.backend.encode(text, add_special_tokens=False)
        # A tokenizer that tells no words makes each token one.
        words = [i if w is None else w for i, w in enumerate(encoding.word_ids)]
        for start in range(0, len(encoding.ids), room):
            ids = encoding.ids[start : start + room]
            yield Stretch(tuple(ids), tuple(words[start : start + room]))
