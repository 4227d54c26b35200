"""Heads that read: where a language model has its vocabulary, a task has its answers.

    class       W f(pool(h)) + b      one of K labels for a text, or for a pair of texts
    token       W h_t + b             one of K labels for each word
    number      w . f(pool(h)) + b    a grade, a likeness, a relevance
    embedding   pool(h)               a vector of which near means alike
    words       `bert_heads.py`       which tokens were hidden

A head is a transform and the last of them: adapters before it do not freeze it, and without any
the whole model is trained. Its labels stand in its configuration, so a trained model knows them.
Devlin et al. 2018, section 4; Reimers and Gurevych 2019, arXiv:1908.10084.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Float, Int
from pydantic import field_validator
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError, did_you_mean
from treadle.models.bert_heads import MaskedHead, MaskedWords, PoolerHead
from treadle.models.decoder import DecoderModel, Wordless
from treadle.models.pooling import MeanPooling, Pooling, wide
from treadle.models.transform import Transform
from treadle.nn.context import Packed

CARD = Card(
    id="ft.heads",
    paper="Devlin et al. 2018, arXiv:1810.04805; Reimers and Gurevych 2019, arXiv:1908.10084",
    summary="Heads for classes, pairs of texts, word labels and grades, on encoders and decoders.",
    recipe="treadle run classify steps.train.source.texts.path=texts.jsonl "
    "steps.measure.benchmarks.0.texts.path=texts.jsonl",
    oracle="tests/models/test_models_heads.py::test_classes_match_transformers",
)

M = TypeVar("M", bound=nn.Module)


class TaskHead(Wordless, ABC):
    """Reads hidden states instead of predicting the next token."""

    labels: tuple[str, ...] = ()
    """Of its outputs, where they are classes."""
    pooling: Pooling | None = None
    """Where it reads texts as a whole."""

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "N D"], context: Packed, places: Int[Tensor, " M"]
    ) -> Float[Tensor, "M K"]:
        """In float32: one row a document, or for heads of tokens one row a place."""

    def extra_repr(self) -> str:
        return f"labels={self.labels}, pooling={self.pooling!r}"


class Projection(Config):
    """A shape: what stands between the pooled vector and the last layer."""

    @abstractmethod
    def build(self, dim: int, before: nn.Module) -> nn.Module:
        """A module `[S dim] -> [S dim]`; `before` is the head that is replaced."""


class Straight(Projection):
    """Nothing."""

    def build(self, dim: int, before: nn.Module) -> nn.Module:
        return nn.Identity()


class TanhLayer(Projection):
    """tanh(W x + b): BERT's pooler, with its weights where the model has one."""

    def build(self, dim: int, before: nn.Module) -> nn.Module:
        linear = before.pooler if isinstance(before, PoolerHead) else nn.Linear(dim, dim)
        return nn.Sequential(linear, nn.Tanh())


class Labels(Config):
    """A mix-in shape of heads with classes."""

    labels: tuple[str, ...]
    """Their names, in the order of the outputs."""

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) < 2:
            raise ValueError(f"{len(labels)} labels leave nothing to choose: name two or more")
        if len(set(labels)) < len(labels) or not all(labels):
            raise ValueError(f"a label is empty or named twice: {', '.join(labels)}")
        return labels


class ClassHead(Transform, Labels):
    """One of several labels for a text or a pair of texts."""

    pooling: Pooling = MeanPooling()
    """`LastToken` for decoders."""
    through: Projection = Straight()

    def __call__(self, model: M) -> M:
        return put_head(model, lambda m: TextReadout(m, self), owner="ClassHead")


class TokenHead(Transform, Labels):
    """One of several labels for each word."""

    def __call__(self, model: M) -> M:
        return put_head(model, lambda m: TokenReadout(m, self.labels), owner="TokenHead")


class NumberHead(Transform):
    """A number for a text or a pair of texts: with pairs, a cross-encoder."""

    pooling: Pooling = MeanPooling()
    through: Projection = Straight()

    def __call__(self, model: M) -> M:
        return put_head(model, lambda m: TextReadout(m, self), owner="NumberHead")


class WordHead(Transform):
    """Words that were masked, as BERT was pretrained; shares its table with the embedding."""

    words: MaskedWords = MaskedWords()

    def __call__(self, model: M) -> M:
        return put_head(model, self._fresh, owner="WordHead")

    def _fresh(self, model: DecoderModel) -> nn.Module:
        config = model.config
        head = self.words.build(config.vocab, config.dim, model.embedding)
        assert isinstance(head, MaskedHead)
        nn.init.normal_(head.words.dense.weight, std=config.std)
        for bias in (head.words.dense.bias, head.words.vocabulary.bias):
            nn.init.zeros_(bias)
        return head


class EmbeddingHead(Transform):
    """The pooled vector itself."""

    pooling: Pooling = MeanPooling()

    def __call__(self, model: M) -> M:
        return put_head(model, lambda m: VectorReadout(self.pooling), owner="EmbeddingHead")


class TextReadout(TaskHead):
    """Pooled, projected, and one linear layer with an output a label, or one in all."""

    def __init__(self, model: DecoderModel, config: ClassHead | NumberHead) -> None:
        super().__init__()
        dim = model.config.dim
        self.labels = config.labels if isinstance(config, ClassHead) else ()
        self.pool = self.pooling = config.pooling
        self.through = config.through.build(dim, model.head)
        self.linear = _output(dim, max(1, len(self.labels)), model.config.std)

    def forward(
        self, hidden: Float[Tensor, "N D"], context: Packed, places: Int[Tensor, " M"]
    ) -> Float[Tensor, "S K"]:
        pooled = self.pool(hidden, context.layout).to(self.linear.weight.dtype)
        logits: Tensor = self.linear(self.through(pooled))
        return wide(logits)


class TokenReadout(TaskHead):
    """One linear layer at the places asked for."""

    def __init__(self, model: DecoderModel, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.labels = labels
        self.linear = _output(model.config.dim, len(labels), model.config.std)

    def forward(
        self, hidden: Float[Tensor, "N D"], context: Packed, places: Int[Tensor, " M"]
    ) -> Float[Tensor, "M K"]:
        logits: Tensor = self.linear(hidden[places])
        return wide(logits)


class VectorReadout(TaskHead):
    """Nothing that is trained but the model."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pool = self.pooling = pooling

    def forward(
        self, hidden: Float[Tensor, "N D"], context: Packed, places: Int[Tensor, " M"]
    ) -> Float[Tensor, "S D"]:
        return self.pool(hidden, context.layout)


def _output(dim: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(dim, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


def put_head(model: M, build: Callable[[DecoderModel], nn.Module], *, owner: str) -> M:
    """The model with another head; the one mechanism behind all heads.

    Raises:
        ConfigError: `model` is none that has a head.
    """
    if not isinstance(model, DecoderModel):
        raise ConfigError(f"{owner}: a {type(model).__name__} is no decoder")
    model.head = build(model).to(model.embedding.weight.device)
    return model


def read(
    model: DecoderModel, tokens: Int[Tensor, " N"], context: Packed, places: Int[Tensor, " M"]
) -> Float[Tensor, "M K"]:
    """What the model's head says of the texts.

    Raises:
        TreadleError: it has no head for a task.
    """
    head = task_head(model)
    output: Tensor = head(model(tokens, context), context, places)
    return output


def task_head(model: DecoderModel) -> TaskHead:
    """The head of a model that was made for a task.

    Raises:
        TreadleError: it has none.
    """
    head: nn.Module = model.head
    if not isinstance(head, TaskHead):
        raise TreadleError(
            f"the model ends in a {type(head).__name__}, no head for a task: add one as the last "
            "transform (ClassHead, TokenHead, NumberHead, EmbeddingHead), or name a trained model"
        )
    return head


def label_number(label: str | int, labels: tuple[str, ...]) -> int:
    """Which output a label stands for: its name, or its number.

    Raises:
        TreadleError: there is no such label.
    """
    if isinstance(label, str):
        if label not in labels:
            raise TreadleError(
                f"label `{label}` is none of the head's{did_you_mean(label, labels)}; add it to "
                "`labels`, or mend the data"
            )
        return labels.index(label)
    if not 0 <= label < len(labels):
        raise TreadleError(
            f"label {label} is out of range: the head has {len(labels)} labels, numbered from 0 "
            f"to {len(labels) - 1} ({', '.join(labels)})"
        )
    return label
