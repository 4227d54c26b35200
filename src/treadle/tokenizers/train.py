"""Byte-level byte-pair encoding: train a vocabulary that spells any text.

Text is cut into pieces by a pattern, pieces are spelled in bytes, and the pair of neighbours that
is most frequent becomes a new token, again and again (ties: the pair whose tokens are older).
Every byte is a token, so nothing is ever unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

import tokenizers
from pydantic import model_validator
from tokenizers import Regex, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.core.progress import Progress, Silent
from treadle.tokenizers.cuts import GPT4, splitter
from treadle.tokenizers.template import CHATML
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer

CARD = Card(
    id="tok.bbpe",
    paper="Sennrich et al. 2016 (BPE); Radford et al. 2019, GPT-2 (bytes)",
    summary="Train a byte-level BPE tokenizer; lossless on any bytes.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/tokenizers/test_tokenizers_train.py::test_merges_match_naive_trainer",
)


class ByteLevelBPE(Config):
    """Byte-level BPE, with a ChatML chat template if its special tokens allow."""

    vocab_size: int
    """Ids in all: special tokens, 256 bytes, merges. A small text gives fewer."""
    min_frequency: int = 2
    """A pair that is rarer is not merged."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    """They get the first ids; the first of all ends a text and pads."""
    pattern: str = GPT4
    """Regular expression that cuts text into pieces: `cuts.GPT4`, `cuts.GPT2` or another."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        least = 256 + len(self.special_tokens)
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size is {self.vocab_size}: 256 bytes and {len(self.special_tokens)} "
                f"special tokens need at least {least}"
            )
        if not self.special_tokens:
            raise ValueError("special_tokens is empty: name at least the token that ends a text")
        try:
            Regex(self.pattern)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self

    def __call__(self, texts: Iterable[str], *, progress: Progress | None = None) -> Tokenizer:
        """Train on texts, which are read once and not kept.

        Raises:
            TreadleError: there is no text.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = splitter((self.pattern,))
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=list(self.special_tokens),
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_told(texts, progress or Silent()), trainer)
        eos = self.special_tokens[0]
        speaks = {"<|im_start|>", "<|im_end|>"} <= set(self.special_tokens)
        return Tokenizer(
            backend,
            special=SpecialTokens(bos=eos, eos=eos, pad=eos),
            chat_template=CHATML if speaks else None,
        )


def _told(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    """The texts, with word of how far they are; an error where there are none."""
    characters = 0
    with progress.task("tokenizer: characters read", total=None) as task:
        for text in texts:
            yield text
            characters += len(text)
            task.update(characters)
    if characters == 0:
        raise TreadleError("there is no text to train a tokenizer on; check the path of the corpus")
    progress.say(f"tokenizer: {characters:,} characters read; merging")
