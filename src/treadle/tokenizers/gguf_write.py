"""What GGUF files say of a tokenizer: the way out of `gguf.py`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

import tokenizers
from tokenizers.models import BPE

from treadle.core.errors import TreadleError
from treadle.tokenizers.cuts import PRES, PROBE, splitter
from treadle.tokenizers.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, merges_of
from treadle.tokenizers.pieces import is_byte_level
from treadle.tokenizers.tokenizer import TURN_ENDS, Tokenizer


def gguf_metadata(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> dict[str, Any]:
    """`tokenizer.*` keys as plain values; ids are unsigned, types signed, scores float32."""
    backend = tokenizer.backend
    if not isinstance(backend.model, BPE):
        raise TreadleError(
            f"{type(backend.model).__name__} tokenizers cannot be written to GGUF; BPE can"
        )
    tokens, types = _tokens(tokenizer, vocab_size)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    state = _model_state(backend)
    if is_byte_level(backend):
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_of(backend, state),
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in state["merges"]],
        }
    else:
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": _scores(state, tokens, types),
            "tokenizer.ggml.add_space_prefix": _prepends_space(backend),
        }
    around = backend.encode("a", add_special_tokens=True).ids
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.token_id(tokenizer.special.unk),
        "eot": next((i for i in map(tokenizer.token_id, TURN_ENDS) if i is not None), None),
    }
    metadata |= {f"tokenizer.ggml.{k}_token_id": i for k, i in ids.items() if i is not None}
    metadata["tokenizer.ggml.add_bos_token"] = ids["bos"] is not None and around[0] == ids["bos"]
    metadata["tokenizer.ggml.add_eos_token"] = ids["eos"] is not None and around[-1] == ids["eos"]
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _tokens(tokenizer: Tokenizer, vocab_size: int | None) -> tuple[list[str], list[int]]:
    backend = tokenizer.backend
    size = max(vocab_size or 0, tokenizer.vocab_size)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    sentencepiece = not is_byte_level(backend)
    added = backend.get_added_tokens_decoder()
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        tokens[i], types[i] = token, NORMAL
        if sentencepiece and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for i, extra in added.items():
        types[i] = CONTROL if extra.special else USER_DEFINED
        if sentencepiece and not extra.special:  # found in the text before spaces are respelled
            tokens[i] = tokens[i].replace("▁", " ")
    unknown = tokenizer.token_id(tokenizer.special.unk)
    if sentencepiece and unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _model_state(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(backend.model.__getstate__()))


def _pre_of(backend: tokenizers.Tokenizer, state: Mapping[str, Any]) -> str:
    """The name of the cutting rule, found by cutting a text that tells all of them apart."""
    normal = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    cut = backend.pre_tokenizer.pre_tokenize_str(PROBE) if backend.pre_tokenizer else []
    for name, pre in PRES.items():
        if normal not in (PROBE, unicodedata.normalize("NFC", PROBE)):
            break
        if cut != splitter(pre.patterns).pre_tokenize_str(PROBE):
            continue
        if bool(state["ignore_merges"]) != pre.ignore_merges:
            _check_reachable(
                state, {t.content for t in backend.get_added_tokens_decoder().values()}
            )
        return name
    raise TreadleError(
        "llama.cpp has no rule that cuts text as this tokenizer does; it can be written to GGUF "
        f"if it is trained with one of the patterns of {', '.join(PRES)}"
    )


def _check_reachable(state: Mapping[str, Any], added: set[str]) -> None:
    """Taking whole tokens or merging must come to the same thing for every token."""
    merging = BPE(
        vocab=state["vocab"], merges=[(a, b) for a, b in state["merges"]], ignore_merges=False
    )
    for token in state["vocab"].keys() - added:
        if len(merging.tokenize(token)) > 1:
            raise TreadleError(
                f"token `{token}` cannot be reached by merges, and llama.cpp treats such tokens "
                "otherwise for this way of cutting text; it cannot be written to GGUF"
            )


def _prepends_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text begins with U+2581; nothing else may happen to it before merging."""
    shown = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    pieces = backend.pre_tokenizer.pre_tokenize_str(shown) if backend.pre_tokenizer else []
    shown = pieces[0][0] if pieces else shown
    plain = PROBE.replace(" ", "▁")
    if len(pieces) > 1 or shown not in (plain, "▁" + plain):
        raise TreadleError(
            "this tokenizer changes or cuts text before merging, which llama.cpp's SentencePiece "
            "does not; it cannot be written to GGUF"
        )
    return shown != plain


def _scores(state: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Scores that order the merges as their ranks do.

    llama.cpp merges any two neighbours that join to a token, so the merges must be all such
    pairs, those of one token together.
    """
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = [
        (left, right)
        for left, right in state["merges"]
        if left in normal and right in normal and left + right in normal
    ]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = {token: -float(ranks.get(token, len(ranks))) for token in normal}
    given = merges_of({token: scores[token] for token in tokens if token in normal})
    if [a + b for a, b in given] != [a + b for a, b in merges] or set(given) != set(merges):
        raise TreadleError(
            "these merges cannot be told by scores alone, as llama.cpp's SentencePiece needs; "
            "byte-level BPE can be written to GGUF"
        )
    return [scores.get(token, 0.0) for token in tokens]
