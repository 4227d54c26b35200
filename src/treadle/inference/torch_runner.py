"""A runner in plain torch: any decoder, its adapters, quantised layers and autocast included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.inference.cache import Cache
from treadle.inference.decode import Decode, Eager
from treadle.inference.runner import Batch, Name, Runner
from treadle.models.decoder import DecoderModel, cannot_write


class TorchRunner(Runner):
    """A decoder with `pages` pages of `page` tokens, kept as `cache` says, or as fits `decode`."""

    def __init__(
        self,
        model: DecoderModel,
        *,
        pages: int,
        page: int = 16,
        cache: Cache | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        decode: Decode = Eager(),
    ) -> None:
        self.model, self.autocast = model, autocast
        self.page, self.pages = page, pages
        self.memory = (cache or decode.cache(model)).build(model, pages=pages, page=page)
        self.advance = decode.build(model, self.memory, autocast)
        self.vocab, self.context = model.config.vocab, self.memory.context
        self.lasting = self.memory.lasting
        self.refusal = cannot_write(model)
        self.device = model.embedding.weight.device
        self.hidden = torch.empty(0, model.config.dim)
        """Of the last pass: final hidden states of the tokens whose logits it gave."""

    @torch.inference_mode()
    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        if self.advance is not None and self.advance.takes(batch):
            return self.advance(batch)
        order, context = self.memory.arrange(batch)
        firsts = list(accumulate(batch.counts, initial=0))
        tokens = [t for i in order for t in batch.tokens[firsts[i] : firsts[i + 1]]]
        with self.autocast():
            with self._routed(batch, order, batch.counts):
                hidden = self.model(torch.tensor(tokens, device=self.device), context)
            wanted = self._wanted(batch, order)
            if wanted != list(range(len(tokens))):
                hidden = hidden[wanted]
            self.hidden = hidden
            with self._routed(batch, list(range(len(order))), batch.outputs):
                return self.model.logits(hidden).float()

    def _routed(
        self, batch: Batch, order: list[int], counts: list[int]
    ) -> AbstractContextManager[None]:
        """Tokens in this order are taken by the adapters of their sequences."""
        if self.adapters is None or not any(batch.adapters):
            return nullcontext()
        return self.adapters.routed([(batch.adapters[i], counts[i]) for i in order])

    def _wanted(self, batch: Batch, order: list[int]) -> list[int]:
        """Flat indices of the tokens whose logits are asked for, in the batch's own order."""
        end = dict(zip(order, accumulate(batch.counts[i] for i in order), strict=True))
        return [t for i, count in enumerate(batch.outputs) for t in range(end[i] - count, end[i])]

    def weights(self) -> dict[int, int]:
        tensors = chain(self.model.parameters(), self.model.buffers())
        storages = (tensor.untyped_storage() for tensor in tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def fork(self, name: Name, other: Name) -> None:
        self.memory.fork(name, other)

    def end(self, name: Name) -> None:
        self.memory.end(name)

    def forget(self) -> None:
        if self.advance is not None:
            self.advance.forget()

    def copy(self, source: int, target: int) -> None:
        self.memory.copy(source, target)

    def save(self, page: int) -> Tensor:
        return self.memory.save(page)

    @torch.inference_mode()
    def load(self, page: int, content: Tensor) -> None:
        shapes = self.memory.shapes()
        if shapes is not None:  # one token shows what the layers' keys and values look like
            with self.autocast():
                self.model(torch.zeros(1, dtype=torch.long, device=self.device), shapes)
        self.memory.load(page, content)
