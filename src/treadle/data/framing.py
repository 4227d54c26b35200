"""How a text, a pair of texts or a run of words becomes the tokens that a head reads.

A tokenizer that frames texts with special tokens at both ends (BERT: `[CLS] a [SEP] b [SEP]`) does
so here, with the types of its parts. Another joins a pair by a line break and ends in its
end-of-text token, so that a head which reads the last token finds the same one in every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.nn.layout import Layout
from treadle.tokenizers.tokenizer import Tokenizer

JOINT = "\n"


@dataclass(frozen=True)
class Framed:
    """Tokens of one document."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """Which part each belongs to, 0 or 1."""
    places: tuple[int, ...] = ()
    """Of words: where the first token of each stands; words that were cut off have none."""


class Framer:
    """Frames texts with one tokenizer.

    Args:
        longest: most tokens of a document, the frame included.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        backend = tokenizer.backend
        one, other = (backend.encode(t, add_special_tokens=False) for t in ("a", "b"))
        pair = backend.post_process(one, other)
        special = set(pair.ids) - {*one.ids, *other.ids}
        alone = _split(backend.post_process(one).ids, special)
        self.before, self.after = alone[0], alone[-1]
        if self.after:
            between = _split(pair.ids, special)[1:-1]
            self.middle, self.second_type = between[0] if between else (), pair.type_ids[-1]
        else:
            self.middle, self.second_type = tuple(tokenizer.encode(JOINT)), 0
            self.after = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def text(self, first: str, second: str | None = None) -> Framed:
        """
        Raises:
            TreadleError: a text is empty, or `longest` leaves no room beside the frame.
        """
        for text in (first, second):
            if text is not None and not text.strip():
                raise TreadleError("a text is empty: there is nothing to read in it")
        a = self.tokenizer.encode(first, parse_special=False)
        if second is None:
            a = a[: self._room(len(self.before) + len(self.after), 1)]
            ids = (*self.before, *a, *self.after)
            return Framed(ids, (0,) * len(ids))
        b = self.tokenizer.encode(second, parse_special=False)
        room = self._room(len(self.before) + len(self.middle) + len(self.after), 2)
        a, b = _shortened(a, b, room)
        head, tail = (*self.before, *a, *self.middle), (*b, *self.after)
        return Framed((*head, *tail), (0,) * len(head) + (self.second_type,) * len(tail))

    def words(self, words: Sequence[str]) -> Framed:
        """Words joined by spaces; each is read at its first token.

        Raises:
            TreadleError: there are none, or `longest` leaves no room beside the frame.
        """
        if not words or not all(word.strip() for word in words):
            raise TreadleError("a word is empty, or there are none: there is nothing to label")
        encoded = self.tokenizer.encode_spans(" ".join(words))
        room = self._room(len(self.before) + len(self.after), 1)
        places: list[int] = []
        token = start = 0
        for word in words:
            while token < len(encoded.ends) and encoded.ends[token] <= start:
                token += 1
            if token >= min(room, len(encoded.ends)):
                break
            places.append(len(self.before) + token)
            start += len(word) + 1
        ids = (*self.before, *encoded.ids[:room], *self.after)
        return Framed(ids, (0,) * len(ids), tuple(places))

    def _room(self, frame: int, texts: int) -> int:
        if self.longest < frame + texts:
            raise TreadleError(
                f"longest={self.longest} leaves no room beside {frame} special tokens: raise it"
            )
        return self.longest - frame


def _split(ids: Sequence[int], special: set[int]) -> list[tuple[int, ...]]:
    """The runs of special tokens before, between and after the texts."""
    runs: list[list[int]] = [[]]
    inside = False
    for token in ids:
        if token in special:
            runs[-1].append(token)
            inside = False
        elif not inside:
            runs.append([])
            inside = True
    return [tuple(run) for run in runs]


def _shortened(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cut the longer one until both fit, then both alike."""
    if len(a) + len(b) <= room:
        return a, b
    short = min(len(a), len(b), room // 2)
    if len(a) <= len(b):
        return a[:short], b[: room - short]
    return a[: room - short], b[:short]


def laid(documents: Sequence[Framed]) -> Batch:
    """Documents one after another; the predictions are at their places, or one at each end."""
    layout = Layout(tuple(len(d.ids) for d in documents))
    sources, sequences = [], []
    for number, (start, document) in enumerate(zip(layout.starts, documents, strict=True)):
        places = document.places or (len(document.ids) - 1,)
        sources += [start + p for p in places]
        sequences += [number] * len(places)
    types = [t for d in documents for t in d.types]
    return Batch(
        tokens=torch.tensor([t for d in documents for t in d.ids]),
        layout=layout,
        sources=torch.tensor(sources),
        targets=torch.zeros(len(sources), dtype=torch.long),
        weights=torch.ones(len(sources)),
        sequences=torch.tensor(sequences),
        sequence_count=len(documents),
        types=torch.tensor(types) if any(types) else None,
    )
