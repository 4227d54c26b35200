"""Tokenizers inside GGUF files, in both directions.

GGUF holds tokens, their types, and merges (`tokenizer.ggml.model = gpt2`, byte-level BPE) or
scores (`llama`, SentencePiece BPE: of all neighbours whose concatenation is a token, the one with
the best score is merged first). How text is cut before merging is only named (`pre`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from treadle.core.errors import FileFormatError, TreadleError, did_you_mean
from treadle.tokenizers.cuts import ALIASES, PRES, PROBE, splitter
from treadle.tokenizers.pieces import is_byte_level
from treadle.tokenizers.tokenizer import TURN_ENDS, SpecialTokens, Tokenizer

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
