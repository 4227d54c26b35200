"""BERT: an encoder. Every token sees all others, norms stand behind each branch.

The same tree as a decoder's, with other values: attention that is not causal, `PostNorm`, learned
positions, vectors for the two sentences of a pair, a norm of the embeddings. all-MiniLM-L6-v2 and
its like are of this layout. Which heads a checkpoint has its config.json tells by the class that
wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.bert_heads import MaskedWords, Pooler, Pretraining
from treadle.models.decoder import Decoder, Head
from treadle.models.family import Family, HuggingFace
from treadle.models.gpt2 import parts
from treadle.models.hub.hf_config import HfConfig, activation_name
from treadle.models.weights import Rule, expand, rule
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm, NoNorm, Norm, PostNorm
from treadle.nn.positions import NoPositions

CARD = Card(
    id="model.bert",
    paper="Devlin et al. 2018, BERT, arXiv:1810.04805; Wang et al. 2020, MiniLM, arXiv:2002.10957",
    summary="BERT encoders with pooler, masked-word and next-sentence heads.",
    recipe="treadle embed all-minilm-l6-v2 'The loom was warm.'",
    oracle="tests/models/test_models_bert.py::test_outputs_and_gradients_match_transformers",
)

HEADS: Mapping[str, type[Head]] = MappingProxyType(
    {
        "BertModel": Pooler,
        "BertForMaskedLM": MaskedWords,
        "BertForPreTraining": Pretraining,
    }
)
"""The head of each class of transformers."""


def bert(
    *,
    dim: int = 768,
    layers: int = 12,
    heads: int = 12,
    vocab: int = 30_522,
    context: int = 512,
    head: Head = MaskedWords(),
) -> Decoder:
    """A BERT of any size."""
    norm = LayerNorm(eps=1e-12)
    mixer = Attention(
        heads=heads, positions=NoPositions(), qkv_bias=True, out_bias=True, causal=False
    )
    block = Block(
        mixer=mixer,
        ffn=MLP(hidden=4 * dim, activation="gelu"),
        norm=norm,
        placement=PostNorm(),
    )
    return Decoder(
        vocab=vocab,
        dim=dim,
        context=context,
        blocks=(block,) * layers,
        norm=NoNorm(),
        head=head,
        learned_positions=True,
        token_types=2,
        embedding_norm=norm,
    )


def bert_base() -> Decoder:
    """BERT base with its pooler: 109,482,240 parameters."""
    return bert(head=Pooler())


def minilm_l6() -> Decoder:
    """all-MiniLM-L6-v2: 22,713,216 parameters."""
    return bert(dim=384, layers=6, head=Pooler())


def from_hf(config: Mapping[str, Any]) -> Decoder:
    """The encoder that a config.json of model type `bert` describes."""
    hf = HfConfig(config)
    hf.refuse("position_embedding_type", "absolute")
    hf.refuse("is_decoder", False)
    hf.refuse("add_cross_attention", False)
    hf.refuse("tie_word_embeddings", True)
    mlp = MLP(
        hidden=hf.integer("intermediate_size"), activation=hf.activation("hidden_act", "gelu")
    )
    norm = LayerNorm(eps=hf.number("layer_norm_eps", 1e-12))
    encoder = bert(
        dim=hf.integer("hidden_size"),
        layers=hf.integer("num_hidden_layers"),
        heads=hf.integer("num_attention_heads"),
        vocab=hf.integer("vocab_size"),
        context=hf.integer("max_position_embeddings", 512),
        head=_head(hf, mlp, norm),
    )
    blocks = tuple(block.replace(ffn=mlp, norm=norm) for block in encoder.blocks)
    return encoder.replace(
        blocks=blocks,
        embedding_norm=norm,
        token_types=hf.integer("type_vocab_size", 2),
        std=hf.number("initializer_range", 0.02),
    )


def _head(hf: HfConfig, mlp: MLP, norm: Norm) -> Head:
    written = (hf.data.get("architectures") or ["BertModel"])[0]
    if written not in HEADS:
        raise ConfigError(
            f"config.json: a {written} has a head for one task; treadle reads the encoder of "
            f"{', '.join(HEADS)}, and trains heads of its own on it"
        )
    words = MaskedWords(norm=norm, activation=mlp.activation)
    heads: dict[str, Head] = {
        "BertModel": Pooler(),
        "BertForMaskedLM": words,
        "BertForPreTraining": Pretraining(words=words),
    }
    return heads[written]


def to_hf(decoder: Decoder) -> dict[str, Any]:
    """config.json of a BERT."""
    attention, mlp, eps = parts(decoder, "bert")
    names = {head: name for name, head in HEADS.items()}
    if type(decoder.head) not in names:
        raise ConfigError(f"bert has heads of its own, not {decoder.head!r}")
    return {
        "architectures": [names[type(decoder.head)]],
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.dim,
        "num_hidden_layers": len(decoder.blocks),
        "num_attention_heads": attention.heads,
        "intermediate_size": mlp.hidden,
        "hidden_act": activation_name(mlp.activation),
        "max_position_embeddings": decoder.context,
        "type_vocab_size": decoder.token_types,
        "layer_norm_eps": eps,
        "initializer_range": decoder.std,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        # treadle trains without dropout; transformers would switch it on.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


PLACES = (
    ("bert.embeddings.LayerNorm", "embedding_norm"),
    ("bert.encoder.layer.{i}.attention.self.query", "blocks.{i}.mixer.q"),
    ("bert.encoder.layer.{i}.attention.self.key", "blocks.{i}.mixer.k"),
    ("bert.encoder.layer.{i}.attention.self.value", "blocks.{i}.mixer.v"),
    ("bert.encoder.layer.{i}.attention.output.dense", "blocks.{i}.mixer.o"),
    ("bert.encoder.layer.{i}.attention.output.LayerNorm", "blocks.{i}.mixer_norms.outer"),
    ("bert.encoder.layer.{i}.intermediate.dense", "blocks.{i}.ffn.up"),
    ("bert.encoder.layer.{i}.output.dense", "blocks.{i}.ffn.down"),
    ("bert.encoder.layer.{i}.output.LayerNorm", "blocks.{i}.ffn_norms.outer"),
    ("bert.pooler.dense", "head.pooler"),
    ("cls.predictions.transform.dense", "head.words.dense"),
    ("cls.predictions.transform.LayerNorm", "head.words.norm"),
    ("cls.seq_relationship", "head.next"),
)
"""Where the layers with weight and bias stand, theirs and ours."""


def hf_rules(decoder: Decoder) -> tuple[Rule, ...]:
    rules = [
        rule("bert.embeddings.word_embeddings.weight", "embedding.weight"),
        rule("bert.embeddings.position_embeddings.weight", "position.weight"),
        rule("bert.embeddings.token_type_embeddings.weight", "token_type.weight"),
        rule("cls.predictions.bias", "head.words.vocabulary.bias"),
        *(
            rule(f"{theirs}.{kind}", f"{ours}.{kind}")
            for theirs, ours in PLACES
            for kind in ("weight", "bias")
        ),
    ]
    return expand(rules, len(decoder.blocks))


FAMILY = Family(
    name="bert",
    huggingface=HuggingFace(
        model_type="bert",
        architecture="BertModel",
        read=from_hf,
        write=to_hf,
        rules=hf_rules,
        prefix="bert.",
        # The second are copies of what is tied: the embedding and the bias above.
        ignored=("*embeddings.position_ids", "cls.predictions.decoder.*"),
    ),
    gguf=None,
)
