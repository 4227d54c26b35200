"""Tiny models with heads, a word tokenizer as BERT frames it, and rows on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from treadle.data.source import Env
from treadle.models.bert import bert
from treadle.models.bert_heads import Pooler
from treadle.models.decoder import DecoderModel
from treadle.models.llama import tiny_llama
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer

WORDS = ("warm", "cold", "loom", "thread", "red", "blue", "old", "new", "good", "bad")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
VOCAB = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}


def framed_tokenizer() -> Tokenizer:
    """`[CLS] a [SEP] b [SEP]`, with types 0 and 1."""
    backend = words_backend()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, VOCAB[t]) for t in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend)


def open_tokenizer() -> Tokenizer:
    """No frame but an end-of-text token, as decoders have it."""
    return Tokenizer(words_backend(), special=SpecialTokens(eos="[SEP]"))


def words_backend() -> tokenizers.Tokenizer:
    model = tokenizers.models.WordLevel({**VOCAB, "[UNK]": len(VOCAB)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return backend


def tiny_encoder(seed: int = 0) -> DecoderModel:
    torch.manual_seed(seed)
    config = bert(dim=16, layers=2, heads=2, vocab=len(VOCAB) + 1, context=32, head=Pooler())
    return config.replace(std=0.5).build()


def tiny_decoder(seed: int = 0) -> DecoderModel:
    torch.manual_seed(seed)
    return tiny_llama(len(VOCAB) + 1, dim=16, layers=2, heads=2, kv_heads=1, hidden=32).build()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def environment(model: DecoderModel, folder: Path, tokenizer: Tokenizer | None = None) -> Env:
    return Env(model=model, tokenizer=tokenizer or framed_tokenizer(), scratch=folder)
