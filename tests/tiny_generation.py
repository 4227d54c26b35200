"""A tiny model and a tokenizer whose tokens are bytes, for tests of generation."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from treadle.models.decoder import Decoder, DecoderModel
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer

END = 256


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special=SpecialTokens(eos="<end>"))


def tiny_model(*windows: int | None, seed: int = 0, context: int = 128) -> DecoderModel:
    torch.manual_seed(seed)
    blocks = tuple(
        Block(mixer=Attention(heads=4, kv_heads=2, window=w), ffn=GatedMLP(hidden=32))
        for w in windows or (None, None)
    )
    decoder = Decoder(vocab=257, dim=16, context=context, blocks=blocks, std=0.5)
    return decoder.build().eval()
