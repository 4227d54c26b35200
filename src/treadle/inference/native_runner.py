"""Generation on the processor: a decoder in 4 to 8 bits, one call of native code a pass.

Weights keep the numbers of GGUF's blocks, repacked once; activations are rounded to 8 bits in
groups of 32; keys and values are kept in float16. A pass takes any mixture of sequences: some at
their next token, some at a piece of their prompt.
"""

from __future__ import annotations

import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.core.machine import machine
from treadle.inference.native_memory import Recycled
from treadle.inference.native_operands import STRIP, matrix_sizes, vectors_of
from treadle.inference.native_shape import native_plan
from treadle.inference.native_weights import NativeWeights, RoundedModel, StoredFile
from treadle.inference.runner import Batch, Runner
from treadle.kernels.native.build import Pass, library
from treadle.kernels.native.levels import find_level
from treadle.kernels.native.matrix import FORMATS, Arena, packed_bytes
from treadle.models.decoder import DecoderModel, TiedHead
from treadle.models.hub.load import load_model

CARD = Card(
    id="inf.compile",
    paper="Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Kwon et al. 2023, PagedAttention",
    summary="Native kernels for processors: weights in 4 to 8 bits, paged cache, one call a pass.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --device native",
    oracle="tests/inference/test_inference_native.py::test_logits_are_those_of_the_dense_model",
)


class NativeRunner(Runner):
    """A decoder in native code.

    Args:
        pages: how many; None for four sequences of full length.
        page: tokens in a page, a multiple of 16.
        threads: None for every core that this process may use.
        level: the processor's instructions, as in `find_level`; None for its best.

    Raises:
        TreadleError: the model has a part that only the torch path runs; names it. Or there is no
            compiler.
    """

    def __init__(
        self,
        weights: NativeWeights,
        *,
        pages: int | None = None,
        page: int = 32,
        threads: int | None = None,
        level: str | None = None,
    ) -> None:
        if page < 1 or page % 16:
            raise TreadleError(f"page={page}: native pages hold a multiple of 16 tokens")
        self.decoder = decoder = weights.decoder
        self._plan = native_plan(decoder, page)
        shape = self._plan.shape
        self.page, self.context, self.vocab = page, shape.context, shape.vocab
        self.pages = pages or 4 * -(-shape.context // page)
        part = page * shape.head_dim
        size = (self.pages, shape.layers, shape.kv_heads, 2, part)
        # Of numpy's zeros only what is written to takes memory; torch's are all written to.
        self.cache = torch.from_numpy(np.zeros(size, dtype=np.float16))
        """Of each page, layer and head: keys [head_dim, page], then values [page, head_dim]."""
        self.level = find_level(level).name
        self._library = library(find_level(level))
        self._library.treadle_in_large_pages(self.cache.data_ptr(), self.cache.nbytes)
        sizes = matrix_sizes(decoder, shape)
        needed = (packed_bytes(*size, weights.format_of(name)) for name, size in sizes.items())
        arena = Arena(sum(needed), level)
        threads = threads or machine()["cores"]
        with ThreadPoolExecutor(threads) as pool:
            self.matrices = list(pool.map(lambda name: weights.matrix(name, arena), sizes))
        """Embedding, then of each layer the linear ones, then the head where it is not tied."""
        embedding, *others = self.matrices
        head = embedding if isinstance(decoder.head, TiedHead) else others.pop()
        handles = [m.handle for m in (embedding, head, *others)]
        self._vectors, self._results = vectors_of(weights), Recycled()
        self._ropes = self._plan.ropes()
        self._handle: int | None = self._library.treadle_decoder(
            shape,
            threads,
            (ctypes.c_void_p * len(handles))(*handles),
            (ctypes.c_void_p * len(self._vectors))(
                *(None if v is None else v.data_ptr() for v in self._vectors)
            ),
            (ctypes.c_int32 * shape.layers)(*self._plan.windows),
            (ctypes.c_int32 * shape.layers)(*self._plan.rope_of),
            self._ropes,
        )
        if self._handle is None:
            raise TreadleError("the native decoder got no memory or threads; free some")
        weakref.finalize(self, self._library.treadle_free_decoder, self._handle)

    @staticmethod
    def of_model(
        model: DecoderModel,
        *,
        format: str = "Q8_0",
        pages: int | None = None,
        page: int = 32,
        threads: int | None = None,
        level: str | None = None,
    ) -> NativeRunner:
        """A model in memory, rounded: its layers to `format`, embedding and head to Q8_0."""
        weights = RoundedModel(model, format)
        return NativeRunner(weights, pages=pages, page=page, threads=threads, level=level)

    @staticmethod
    def open(
        path: StrPath,
        *,
        format: str | None = None,
        pages: int | None = None,
        page: int = 32,
        threads: int | None = None,
        level: str | None = None,
    ) -> NativeRunner:
        """The model of a file or folder. Of a GGUF file, the bytes are taken as they are.

        Args:
            format: to which matrices are rounded that are stored in a format which the native
                path does not run; None rounds none, and refuses such files.

        Raises:
            TreadleError: `format` is None and some matrix must be rounded.
        """
        if Path(path).suffix == ".gguf":
            weights = StoredFile(path, format)
            return NativeRunner(weights, pages=pages, page=page, threads=threads, level=level)
        if format is None:
            raise TreadleError(
                f"{path}: not a GGUF file, so its weights are not in few bits; the native path "
                f"runs one of {', '.join(FORMATS)}: name one as `format` to have them rounded to it"
            )
        model = load_model(path, dtype=torch.float32).model
        return NativeRunner.of_model(
            model, format=format, pages=pages, page=page, threads=threads, level=level
        )

    @property
    def nbytes(self) -> int:
        """Of the matrices."""
        return sum(packed_bytes(m.rows, m.columns, m.format.name) for m in self.matrices)

    def weights(self) -> dict[int, int]:
        return {id(self): self.nbytes}

    @property
    def formats(self) -> tuple[str, ...]:
        """Of the matrices, each once."""
        return tuple(sorted({m.format.name for m in self.matrices}))

    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        self._check(batch)
        # Rows a multiple of 4 KB apart would fight for the same places of the caches.
        stride = -(-self.vocab // STRIP) * STRIP + STRIP // 2
        logits = self._results.take(sum(batch.outputs), stride)
        self._pass(batch, self.cache, logits=logits)
        return logits[:, : self.vocab]

    def peaks(self, logits: Float[Tensor, "N V"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        if logits.dtype != torch.float32 or logits.shape[1] != self.vocab or logits.stride(1) != 1:
            return super().peaks(logits)
        tokens = torch.empty(len(logits), dtype=torch.int32)
        normalisers = torch.empty(len(logits))
        self._done(
            self._library.treadle_peaks(
                self._handle,
                logits.data_ptr(),
                len(logits),
                logits.stride(0),
                tokens.data_ptr(),
                normalisers.data_ptr(),
            )
        )
        return tokens.long(), normalisers

    def hidden(self, tokens: list[int]) -> Float[Tensor, "N D"]:
        """The last layer's normed rows of a text, read by itself, without touching the pages.

        Raises:
            TreadleError: it is longer than the context, or has a token of no vocabulary.
        """
        pages = -(-len(tokens) // self.page)
        batch = Batch(tokens, [len(tokens)], [0], [list(range(pages))], [len(tokens)])
        self._check(batch, pages=pages)
        hidden = torch.empty(len(tokens), self._plan.shape.dim)
        self._pass(batch, self.cache.new_empty(pages, *self.cache.shape[1:]), hidden=hidden)
        return hidden

    def _pass(
        self,
        batch: Batch,
        cache: Tensor,
        *,
        logits: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        at = list(accumulate((len(table) for table in batch.tables), initial=0))
        arrays = [
            np.asarray(values, dtype=np.int32)
            for values in (batch.tokens, batch.counts, batch.starts, batch.outputs)
        ]
        arrays.append(np.fromiter(chain.from_iterable(batch.tables), np.int32, at[-1]))
        arrays.append(np.asarray(at[:-1], dtype=np.int32))
        results = [None if t is None else t.data_ptr() for t in (logits, hidden)]
        pointers = [*(array.ctypes.data for array in arrays), cache.data_ptr(), *results]
        stride = 0 if logits is None else logits.shape[1]
        self._done(
            self._library.treadle_run(self._handle, Pass(len(batch.counts), *pointers, stride))
        )

    def _done(self, result: int) -> None:
        if result == 2:
            raise TreadleError("a native runner does not outlive a fork; make one in the child")
        if result:
            raise TreadleError("no memory for this pass; read prompts in smaller pieces")

    def _check(self, batch: Batch, pages: int | None = None) -> None:
        """Native code would read and write wherever a wrong number points."""
        pages = self.pages if pages is None else pages
        if not all(0 <= token < self.vocab for token in batch.tokens):
            raise TreadleError(f"a token outside the vocabulary of {self.vocab}")
        if sum(batch.counts) != len(batch.tokens):
            raise TreadleError(f"counts {batch.counts} of {len(batch.tokens)} tokens")
        rows = zip(batch.counts, batch.starts, batch.tables, batch.outputs, strict=True)
        for count, start, table, outputs in rows:
            if count < 1 or start < 0 or not 0 <= outputs <= count:
                raise TreadleError(f"{count} new tokens at {start}, {outputs} with logits")
            if start + count > self.context:
                raise TreadleError(
                    f"a sequence of {start + count} tokens, the context has {self.context}"
                )
            if len(table) * self.page < start + count:
                raise TreadleError(f"{len(table)} pages for {start + count} tokens")
            if min(table) < 0 or max(table) >= pages:
                raise TreadleError(f"a page outside 0 .. {pages - 1}")

    def copy(self, source: int, target: int) -> None:
        self.cache[target].copy_(self.cache[source])

    def save(self, page: int) -> Tensor:
        return self.cache[page].clone()

    def load(self, page: int, content: Tensor) -> None:
        self.cache[page].copy_(content)
