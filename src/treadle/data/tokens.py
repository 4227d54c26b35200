"""A corpus as one long array of tokens on disk, made once for a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt

from treadle.core.errors import TreadleError
from treadle.core.files import atomic_directory
from treadle.tokenizers.tokenizer import Tokenizer

_BATCH = 256  # documents that are encoded at once


@dataclass(frozen=True)
class TokenArray:
    """Documents one after another, each with its end-of-text token."""

    tokens: UInt[np.ndarray, " N"]
    """Mapped from the disk; only what is read comes into memory."""
    ends: Int64[np.ndarray, " D"]
    """Where each document ends."""

    def slice(self, start: int, stop: int) -> list[int]:
        ids: list[int] = self.tokens[start:stop].tolist()
        return ids


def token_array(folder: Path, texts: Iterable[str], tokenizer: Tokenizer) -> TokenArray:
    """The array in `folder`, made from the texts if it is not there.

    Raises:
        TreadleError: there is no text, or the tokenizer has no end-of-text token.
    """
    if not (folder / "ends.npy").is_file():
        with atomic_directory(folder) as new:
            _write(new, texts, tokenizer)
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ends = np.load(folder / "ends.npy", allow_pickle=False)
    return TokenArray(np.memmap(folder / "tokens.bin", dtype=kind, mode="r"), ends)


def _write(folder: Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    if tokenizer.eos_id is None:
        raise TreadleError(
            "the tokenizer has no end-of-text token to put between documents; name one: "
            'tokenizer.with_special(eos="...")'
        )
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths: list[int] = []
    with open(folder / "tokens.bin", "wb") as file:
        for ids in _encoded(texts, tokenizer):
            whole = ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]
            file.write(np.asarray(whole, dtype=kind).tobytes())
            lengths.append(len(whole))
    if not lengths:
        raise TreadleError("the corpus has no documents; check its path and its parts")
    np.save(folder / "ends.npy", np.cumsum(lengths, dtype=np.int64))


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield from tokenizer.encode_batch(batch, add_special=True, parse_special=False)
