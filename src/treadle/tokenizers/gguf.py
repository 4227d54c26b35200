"""Tokenizers inside GGUF files; `gguf_write.py` is the way back.

GGUF holds tokens, their types, and merges (`tokenizer.ggml.model = gpt2`, byte-level BPE) or
scores (`llama`, SentencePiece BPE: of all neighbours whose concatenation is a token, the one with
the best score is merged first). How text is cut before merging is only named (`pre`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from treadle.core.errors import FileFormatError, did_you_mean
from treadle.tokenizers.cuts import ALIASES, PRES, splitter
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata describes."""
    model = _need(metadata, "tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise FileFormatError(
            f"tokenizer.ggml.model is `{model}`; byte-level BPE (`gpt2`) and SentencePiece BPE "
            "(`llama`) are known"
        )
    tokens = list(_need(metadata, "tokenizer.ggml.tokens"))
    types = list(metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    while types and types[-1] == UNUSED:  # rows that only pad the embedding
        tokens.pop()
        types.pop()
    roles = {
        role: _token_at(metadata, f"tokenizer.ggml.{key}_token_id", tokens)
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    stops = [_token_at(metadata, f"tokenizer.ggml.{k}_token_id", tokens) for k in ("eot", "eom")]
    special = SpecialTokens(**roles, stops=tuple(t for t in stops if t is not None))
    if model == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens)
    else:
        backend, adds_bos = _sentencepiece(metadata, tokens, types)
    _add_special(backend, tokens, types)
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    surround = _surround(backend, special, adds_bos=adds_bos, adds_eos=adds_eos)
    if surround is not None:
        backend.post_processor = surround
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, special=special, chat_template=template)


def _need(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise FileFormatError(f"GGUF metadata has no `{key}`; the file holds no tokenizer")
    return metadata[key]


def _token_at(metadata: Mapping[str, Any], key: str, tokens: Sequence[str]) -> str | None:
    index = metadata.get(key)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise FileFormatError(f"{key} is {index}, but there are {len(tokens)} tokens")
    return str(tokens[index])


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRES.get(ALIASES.get(name, name))
    if pre is None:
        raise FileFormatError(
            f"tokenizer.ggml.pre `{name}` is not known{did_you_mean(name, PRES)}; "
            "load the tokenizer.json of the model instead"
        )
    merges = [_pair(merge) for merge in _need(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges)
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter(pre.patterns)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.adds_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = _need(metadata, "tokenizer.ggml.scores")
    merged = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=False)
        if kind == NORMAL
    }
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges_of(merged),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space_first = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_block = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_block])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = to_block
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, best score first: the ranks of a BPE."""
    order = sorted(scores, key=lambda token: -scores[token])  # stable: ties keep their order
    return [
        (token[:cut], token[cut:])
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]


def _add_special(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_tokens(added)


def _surround(
    backend: tokenizers.Tokenizer, special: SpecialTokens, *, adds_bos: bool, adds_eos: bool
) -> processors.TemplateProcessing | None:
    before = [special.bos] if adds_bos and special.bos else []
    after = [special.eos] if adds_eos and special.eos else []
    if not before and not after:
        return None
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1"],
        special_tokens=[(t, cast(int, backend.token_to_id(t))) for t in (*before, *after)],
    )
