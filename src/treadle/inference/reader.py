"""Reading: what a model with a head for a task says of many texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.data.batch import within_budget
from treadle.data.framing import Framed, Framer, laid
from treadle.models.decoder import DecoderModel
from treadle.models.heads import TaskHead, TokenReadout, read, task_head
from treadle.tokenizers.tokenizer import Tokenizer

Pair = tuple[str, str | None]


@dataclass(frozen=True)
class Reader:
    """A model with a head, and how much it reads at once."""

    model: DecoderModel
    tokenizer: Tokenizer
    longest: int = 256
    """Texts are cut to this many tokens, or to the model's context."""
    tokens: int = 4096
    """Computed in one pass."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def head(self) -> TaskHead:
        return task_head(self.model)

    def texts(
        self, texts: Sequence[Pair], done: Callable[[int], None] = lambda n: None
    ) -> Float[Tensor, "S K"]:
        """A row for each text or pair of texts.

        Raises:
            TreadleError: the head is one for words, or a text is empty.
        """
        if isinstance(self.head, TokenReadout):
            raise TreadleError("the model labels words, not texts")
        framer = self._framer()
        return torch.stack(self._read([framer.text(*pair) for pair in texts], done))

    def words(
        self, texts: Sequence[Sequence[str]], done: Callable[[int], None] = lambda n: None
    ) -> list[Float[Tensor, "W K"]]:
        """A row for each word of each text; words that were cut off have none.

        Raises:
            TreadleError: the head is one for texts, or a word is empty.
        """
        if not isinstance(self.head, TokenReadout):
            raise TreadleError("the model reads texts as a whole and labels no words")
        framer = self._framer()
        return self._read([framer.words(words) for words in texts], done)

    def _framer(self) -> Framer:
        return Framer(self.tokenizer, min(self.longest, self.model.config.context))

    @torch.inference_mode()
    def _read(self, documents: Sequence[Framed], done: Callable[[int], None]) -> list[Tensor]:
        """Long ones first, so that the documents of a pass are about equally long."""
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i].ids))
        found: dict[int, Tensor] = {}
        for run in within_budget([len(documents[i].ids) for i in order], self.tokens):
            batch = laid([documents[order[i]] for i in run]).to(self.model.embedding.weight.device)
            with self.autocast():
                rows = read(self.model, batch.tokens, batch.context(), batch.sources).cpu()
            if not rows.isfinite().all():
                raise TreadleError(
                    "the model gives numbers that are none for some texts: its weights are "
                    "broken, as after a training that diverged; train it again"
                )
            counts = [max(1, len(documents[order[i]].places)) for i in run]
            parts = rows.split(counts) if isinstance(self.head, TokenReadout) else rows.unbind()
            found.update(zip((order[i] for i in run), parts, strict=True))
            done(len(found))
        return [found[i] for i in range(len(documents))]


def unit(vectors: Float[Tensor, "S D"], dims: int | None = None) -> Float[Tensor, "S d"]:
    """Vectors of unit length, or their first `dims` numbers so.

    Raises:
        TreadleError: they have fewer numbers.
    """
    if dims is not None and not 1 <= dims <= vectors.shape[-1]:
        raise TreadleError(f"{dims} dimensions: this model's embeddings have {vectors.shape[-1]}")
    return F.normalize(vectors[..., :dims], dim=-1)
