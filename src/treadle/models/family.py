"""A family: one architecture of the field, and how checkpoints of others spell it.

A family is a value that ties a `Decoder` to Hugging Face's config.json and tensor names, and to
GGUF's metadata and tensor names. A decoder belongs to a family exactly if that family's config,
written and read again, gives the same decoder: there is no second list of what it can express.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, LinearHead, swap
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.reward_head import ScalarHead
from treadle.models.weights import Rule, rule
from treadle.nn.mixers.attention import Attention

SCORER = "ForSequenceClassification"
LABELS = 2
"""What transformers means where a config.json names no labels."""


@dataclass(frozen=True)
class HuggingFace:
    """config.json and tensor names of transformers."""

    model_type: str
    architecture: str
    """transformers' class with a language-modelling head."""
    read: Callable[[Mapping[str, Any]], Decoder]
    write: Callable[[Decoder], dict[str, Any]]
    rules: Callable[[Decoder], tuple[Rule, ...]]
    prefix: str = "model."
    """Front of the names that a checkpoint saved without its head leaves off."""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns of tensors that old checkpoints carry and that hold nothing learned."""
    scorer: str = ""
    """transformers' class for reward models, where it is not named after `architecture`."""

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        """What a config.json describes: a language model or, by its class, a reward model."""
        decoder = self.read(config)
        if not self._scores(config):
            return decoder
        return decoder.replace(head=ScalarHead(pad=config.get("pad_token_id")))

    def config(self, decoder: Decoder) -> dict[str, Any]:
        """Keys of config.json for a language model or a reward model."""
        scorer = self._scorer()
        if scorer is None or not isinstance(decoder.head, ScalarHead):
            return {"architectures": [self.architecture], **self.write(decoder)}
        one: dict[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        if decoder.head.pad is not None:
            one["pad_token_id"] = decoder.head.pad
        return {**self.write(_wordy(decoder)), "architectures": [scorer], **one}

    def names(self, decoder: Decoder) -> tuple[Rule, ...]:
        """The weight table of a language model or a reward model."""
        if self._scorer() is None or not isinstance(decoder.head, ScalarHead):
            return self.rules(decoder)
        return (*self.rules(_wordy(decoder)), rule("score.weight", "head.linear.weight"))

    def _scorer(self) -> str | None:
        """transformers' class with one linear layer on the last hidden state, if it has one."""
        for words in ("ForCausalLM", "LMHeadModel"):
            if self.architecture.endswith(words):
                return self.scorer or self.architecture.removesuffix(words) + SCORER
        return None

    def _scores(self, config: Mapping[str, Any]) -> bool:
        written = [a for a in config.get("architectures") or [] if str(a).endswith(SCORER)]
        if not written or self._scorer() is None:
            return False
        labels = len(config.get("id2label") or {}) or LABELS
        if labels != 1:
            raise ConfigError(
                f"config.json: a {written[0]} of {labels} classes; treadle reads those of one, "
                "which are reward models, and trains heads for classes of its own (ClassHead)"
            )
        return True


@dataclass(frozen=True)
class Gguf:
    """Metadata and tensor names of llama.cpp."""

    architecture: str
    read: Callable[[GgufHeader], Decoder]
    write: Callable[[Decoder], GgufHeader]
    rules: Callable[[Decoder], tuple[Rule, ...]]


@dataclass(frozen=True)
class Family:
    """One architecture of the field."""

    name: str
    huggingface: HuggingFace
    gguf: Gguf | None


def _wordy(decoder: Decoder) -> Decoder:
    """The language model that a reward model was made of."""
    return decoder.replace(head=LinearHead())


def explicit(decoder: Decoder) -> Decoder:
    """The same decoder with the defaults that depend on the width written out."""

    def fill(attention: Attention) -> Attention:
        width = attention.head_dim or decoder.dim // attention.heads
        usual = attention.scale == width**-0.5
        return attention.replace(
            kv_heads=attention.kv_heads or attention.heads,
            head_dim=width,
            scale=None if usual else attention.scale,
        )

    filled: Decoder = swap(decoder, Attention, fill)
    return filled


def uniform_attention(decoder: Decoder, family: str) -> Attention:
    """The attention of the first block, for formats that state one for all blocks.

    Raises:
        ConfigError: the first block mixes tokens in another way.
    """
    mixer = decoder.blocks[0].mixer if decoder.blocks else None
    if not isinstance(mixer, Attention):
        raise ConfigError(f"{family} has softmax attention in its blocks, not {mixer!r}")
    return mixer
