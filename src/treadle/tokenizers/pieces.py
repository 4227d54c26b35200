"""What bytes a token stands for.

A byte-level vocabulary (GPT-2) spells each byte as one printable character; a SentencePiece
vocabulary spells a space as U+2581 and single bytes as `<0xE2>`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import tokenizers


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 is itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder as its steps, each a `type` with its settings."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    return any(step["type"] == "ByteLevel" for step in decoder_steps(backend))


def is_sentencepiece(backend: tokenizers.Tokenizer) -> bool:
    """Whether a space is spelled as U+2581."""
    return any(
        step["type"] == "Metaspace" or step.get("pattern") == {"String": "▁"}
        for step in decoder_steps(backend)
    )


def strips_first_space(backend: tokenizers.Tokenizer) -> bool:
    return any(
        (step["type"] == "Strip" and step["start"] == 1)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in decoder_steps(backend)
    )


def piece_bytes(backend: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """Bytes of every id; empty where an id is not used."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if is_byte_level(backend):
        spell = _byte_level
    elif is_sentencepiece(backend):
        spell = _sentencepiece
    else:
        spell = _plain
    for token, i in vocabulary.items():
        pieces[i] = token.encode() if i in added else spell(token)
    return tuple(pieces)


def _byte_level(token: str) -> bytes:
    alphabet = byte_alphabet()
    if all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _plain(token: str) -> bytes:
    return token.encode()
