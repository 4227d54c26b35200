"""The tokenizer that everything uses: Hugging Face's `tokenizers`, special ids, a chat template.

It reads and writes the files that transformers reads (`tokenizer.json`, `tokenizer_config.json`,
`chat_template.jinja`), and reads and writes the metadata that llama.cpp keeps in GGUF.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, final

import tokenizers

from treadle.core.errors import TreadleError
from treadle.tokenizers.pieces import piece_bytes, strips_first_space
from treadle.tokenizers.template import ChatTemplate

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
"""Tokens that end an assistant turn, in the models that use them."""
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")
"""Tokens that end a text, in the models that use them."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Tokens with a role, as they are spelled; None where the tokenizer has none."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    stops: tuple[str, ...] = ()
    """Further tokens at which generation stops."""


@dataclass(frozen=True)
class Encoded:
    """Tokens and the characters of the text that each covers, together all of them.

    Tokens that share the bytes of one character each cover that character.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]


@final
class Tokenizer:
    """Text to ids and back.

    Args:
        backend: what splits and merges; its truncation and padding are switched off.
        special: the tokens with a role.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: SpecialTokens | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = _completed(special or SpecialTokens(), backend)
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder or a `tokenizer.json`; the files beside it name its special tokens.

        Raises:
            FileFormatError: no such file, or it is not a tokenizer.
        """
        from treadle.tokenizers.files import load_tokenizer

        return cls._of(load_tokenizer(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Build the tokenizer that GGUF metadata describes (`tokenizer.ggml.*`).

        Raises:
            FileFormatError: keys are missing, or the kind is not known.
        """
        from treadle.tokenizers.gguf import tokenizer_from_gguf

        return cls._of(tokenizer_from_gguf(metadata))

    @classmethod
    def _of(cls, other: Tokenizer) -> Self:
        return cls(other.backend, special=other.special, chat_template=other.chat_template)

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers reads; each appears whole or not at all."""
        from treadle.tokenizers.files import save_tokenizer

        save_tokenizer(self, Path(folder))

    def to_gguf_metadata(self, *, vocab_size: int | None = None) -> dict[str, Any]:
        """`tokenizer.*` keys with which llama.cpp gives the same ids.

        Args:
            vocab_size: rows of the model's embedding, if more than the tokenizer has ids.

        Raises:
            TreadleError: llama.cpp has no tokenizer of this kind.
        """
        from treadle.tokenizers.gguf_write import gguf_metadata

        return gguf_metadata(self, vocab_size=vocab_size)

    def with_special(self, **changes: Any) -> Tokenizer:
        """The same tokenizer with other roles, such as `eos="<|im_end|>"`."""
        special = replace(self.special, **changes)
        return Tokenizer(self.backend, special=special, chat_template=self.chat_template)

    def with_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return Tokenizer(self.backend, special=self.special, chat_template=chat_template)

    def padded_apart(self) -> Tokenizer:
        """The same tokenizer with a padding token that ends nothing: programs that look for the
        end of a text before its padding then find it.

        Raises:
            TreadleError: every special token ends a turn or a text.
        """
        ends = {self.eos_id} | {self.token_id(name) for name in TURN_ENDS}
        names = (self.special.pad, self.special.unk, *map(self.spelling, sorted(self.special_ids)))
        for name in names:
            if name is not None and self.token_id(name) not in ends:
                special = replace(self.special, pad=name)
                return Tokenizer(self.backend, special=special, chat_template=self.chat_template)
        raise TreadleError("every special token of the vocabulary ends a turn or a text")

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self._pieces)

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.special.bos)

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.special.eos)

    @property
    def pad_id(self) -> int | None:
        return self.token_id(self.special.pad)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation stops: the end of the text, of a turn, and those named."""
        names = (self.special.eos, *self.special.stops, *TURN_ENDS, *TEXT_ENDS)
        special = self.special_ids
        ids = {self.token_id(name) for name in names}
        return frozenset(i for i in ids if i is not None and (i in special or i == self.eos_id))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def token_id(self, token: str | None) -> int | None:
        """Id of a token as it is spelled in the vocabulary, or None."""
        return None if token is None else self.backend.token_to_id(token)

    def spelling(self, token: int) -> str:
        """How the vocabulary spells an id; empty where the id is not used."""
        return self.backend.id_to_token(token) or ""

    @cached_property
    def digest(self) -> str:
        """A hash that is equal for equal tokenizers (16 hexadecimal digits)."""
        parts = (self.backend.to_str(), repr(self.special), self.chat_template or "")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Ids of a text.

        Args:
            add_special: add what the tokenizer adds around a text, such as a BOS token.
            parse_special: read `<|im_end|>` in the text as the token; False reads it as letters.
        """
        backend = self.backend if parse_special else self._literal
        return list(backend.encode(_sound(text), add_special_tokens=add_special).ids)

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        backend = self.backend if parse_special else self._literal
        sound = [_sound(text) for text in texts]
        encodings = backend.encode_batch_fast(sound, add_special_tokens=add_special)
        return [list(encoding.ids) for encoding in encodings]

    def encode_spans(self, text: str) -> Encoded:
        """Ids of a text and where each token lies in it."""
        encoding = self.backend.encode(_sound(text), add_special_tokens=False)
        ends = list(accumulate((end for _, end in encoding.offsets), max))
        # the library leaves spaces at the edge of tokens out; they belong to the token after
        starts = [min(s, end) for (s, _), end in zip(encoding.offsets, [0, *ends], strict=False)]
        return Encoded(list(encoding.ids), starts, ends)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids whose bytes are exactly `data`, valid UTF-8 or not.

        Raises:
            TreadleError: the vocabulary lacks one of the bytes.
        """
        ids: list[int] = []
        for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            stray = part.encode("utf-8", "surrogateescape")
            if len(part) == 1 and len(stray) == 1 and stray[0] >= 0x80:
                ids.append(self._byte_id(stray))
            elif part:
                ids += self.encode(part, parse_special=False)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, special tokens spelled out."""
        return b"".join(self._pieces[i] for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; part of a character if a token ends inside one."""
        return self._pieces[token]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation by the chat template, which brings its own BOS."""
        return self.chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template.

        Raises:
            TreadleError: there is none.
        """
        if self.chat_template is None:
            raise TreadleError(
                "this tokenizer has no chat template; give it one: "
                "tokenizer.with_template(default_template(tokenizer))"
            )
        roles = {"bos": self.special.bos, "eos": self.special.eos, "pad": self.special.pad}
        names = {f"{role}_token": token for role, token in roles.items() if token is not None}
        return ChatTemplate(self.chat_template, special=names)

    @property
    def strips_first_space(self) -> bool:
        """Whether `decode` drops a space at the start of the text (Llama 2)."""
        return strips_first_space(self.backend)

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        return piece_bytes(self.backend)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that does not read special tokens in text."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def _byte_id(self, byte: bytes) -> int:
        if byte not in self._byte_ids:
            raise TreadleError(f"the vocabulary has no token for the byte 0x{byte.hex()}")
        return self._byte_ids[byte]

    @cached_property
    def _byte_ids(self) -> dict[bytes, int]:
        return {piece: i for i, piece in enumerate(self._pieces) if len(piece) == 1}


def _completed(special: SpecialTokens, backend: tokenizers.Tokenizer) -> SpecialTokens:
    """Roles that no file named, from the well-known spellings."""
    for role in ("bos", "eos", "pad", "unk"):
        token = getattr(special, role)
        if token is not None and backend.token_to_id(token) is None:
            raise TreadleError(f"{role} token `{token}` is not in the vocabulary")
    if special.eos is None:
        known = (t for t in (*TEXT_ENDS, *TURN_ENDS) if backend.token_to_id(t) is not None)
        special = replace(special, eos=next(known, None))
    return special


def _sound(text: str) -> str:
    """Lone surrogates, which JSON can smuggle in and UTF-8 cannot hold, become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
