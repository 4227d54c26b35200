"""A tiny model and a tokenizer whose tokens are bytes, for tests of generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from treadle.models.decoder import Decoder, DecoderModel
from treadle.nn.alibi import ALiBi
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP, GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm
from treadle.nn.positions import NoPositions
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


def variants() -> Iterator[tuple[str, DecoderModel]]:
    """Every kind of attention that a decoder can ask for."""
    torch.manual_seed(1)
    yield "dense", tiny_model()
    yield "window", tiny_model(6, None, 6)
    common = {"ffn": MLP(hidden=32), "norm": LayerNorm()}
    for name, mixer, learned in (
        ("alibi", Attention(heads=4, positions=ALiBi()), False),
        ("learned", Attention(heads=4, kv_heads=1, positions=NoPositions()), True),
        ("softcap", Attention(heads=4, kv_heads=2, softcap=3.0, window=5), False),
    ):
        decoder = Decoder(
            vocab=257,
            dim=16,
            context=128,
            blocks=(Block(mixer=mixer, **common),) * 2,
            learned_positions=learned,
            std=0.5,
        )
        yield name, decoder.build().eval()
