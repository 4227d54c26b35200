"""Constrained output: JSON Schema, regular expressions, grammars.

At each step a token may come only if some text of the language continues so:

    p'(v | x) = p(v | x) 1[x v is a prefix of a word of L] / Z(x)

The sets are computed by llguidance (derivatives of regular expressions and an Earley parser over a
trie of the vocabulary), which is exact for tokens that cross the borders of the grammar's symbols.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.constraint import Constraint
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.constrained",
    paper="Willard and Louf 2023, arXiv:2307.09702; Geng et al. 2023, arXiv:2305.13971",
    summary="Output that follows a JSON Schema, a regular expression or a grammar, in any batch.",
    recipe="treadle generate smollm2-135m-instruct 'A weaver, as JSON:' "
    """--json-schema '{"type": "object", "properties": {"name": {"type": "string"}}}'""",
    oracle="tests/inference/test_inference_constrained.py::test_every_output_is_valid",
)


class Language(Config):
    """A shape: the texts that may be written."""

    @abstractmethod
    def grammar(self) -> str:
        """In llguidance's own format."""

    def build(self, tokenizer: Tokenizer, vocab: int) -> Constraint:
        """The constraint at the start of a text, for a model with `vocab` logits.

        Raises:
            TreadleError: the language is not described well.
        """
        library = _library()
        matcher = library.LLMatcher(_vocabulary(tokenizer, vocab), self.grammar(), log_level=0)
        if matcher.is_error():
            raise TreadleError(f"{type(self).__name__}: {_first_line(matcher.get_error())}")
        return _Matcher(matcher, vocab)


class JsonSchema(Language):
    """JSON that a schema accepts, on one line."""

    text: str = "{}"
    """The schema, itself JSON; `{}` is any value."""

    def grammar(self) -> str:
        try:
            schema = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise TreadleError(f"JsonSchema: the schema is not valid JSON: {error}") from None
        # free white space lets a model write blanks until its tokens are used up
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            made = _library().LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise TreadleError(f"JsonSchema: {error}") from None
        return str(made)


class Regex(Language):
    """Text that a regular expression matches as a whole; Rust's syntax, without look-around."""

    pattern: str = Field(min_length=1)

    def grammar(self) -> str:
        return str(_library().LLMatcher.grammar_from_regex(self.pattern))


class LarkGrammar(Language):
    """Text derived from `start` in a context-free grammar in Lark's syntax."""

    text: str = Field(min_length=1)

    def grammar(self) -> str:
        return str(_library().LLMatcher.grammar_from_lark(self.text))


class _Matcher(Constraint):
    def __init__(self, matcher: Any, vocab: int) -> None:
        self.matcher, self.vocab = matcher, vocab
        self.bits = np.zeros((1, (vocab + 31) // 32), dtype=np.int32)

    def fork(self) -> Constraint:
        return _Matcher(self.matcher.deep_copy(), self.vocab)

    def mask(self) -> Bool[Tensor, " V"]:
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self.matcher, self.bits)
        if self.matcher.is_error():
            raise TreadleError(f"constrained output: {_first_line(self.matcher.get_error())}")
        allowed = np.unpackbits(self.bits.view(np.uint8)[0], bitorder="little")[: self.vocab]
        if not allowed.any():
            raise TreadleError("the constraint allows no token here: the vocabulary lacks some")
        return torch.from_numpy(allowed.view(np.bool_))

    def advance(self, token: int) -> None:
        # a parser that reaches its limits here says so at the next mask
        self.matcher.consume_token(token)

    def done(self) -> bool:
        # a parser in trouble is stopped as well
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise TreadleError(
            "constrained output needs `llguidance`, which is not installed: "
            "pip install 'treadle[constrained]'"
        ) from None
    return llguidance


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab: int) -> Any:
    """llguidance's trie of the vocabulary; takes a fraction of a second for a large one."""
    stops = sorted(tokenizer.stop_ids)
    if not stops:
        raise TreadleError(
            "constrained output needs a token that ends a text; name one: "
            "tokenizer.with_special(eos=...)"
        )
    text = tokenizer.backend.to_str()
    try:
        return _library().LLTokenizer(text, n_vocab=vocab, eos_token=stops)
    except ValueError as error:
        raise TreadleError(f"constrained output cannot read this tokenizer: {error}") from None
