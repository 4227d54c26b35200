"""Generation on the processor: a Llama in 4 or 8 bits, one call of native code a pass.

Weights lie as in GGUF's Q4_0, Q4_1 or Q8_0, repacked once; activations are rounded to 8 bits in
groups of 32; keys and values are kept in float16. A pass takes any mixture of sequences: some at
their next token, some at a piece of their prompt.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.core.machine import machine
from treadle.inference.native_shape import frequencies_of, native_shape
from treadle.inference.runner import Batch, Runner
from treadle.kernels.blocks import block_format, dequantise, quantise
from treadle.kernels.native.build import Pass, Shape, library
from treadle.kernels.native.matrix import FORMATS, NativeMatrix
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_of_gguf
from treadle.models.hub.fill import applicable
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.load import load_model, read_header
from treadle.nn.block import BlockLayer
from treadle.nn.linear import weight_of
from treadle.nn.norms import RMSNormLayer
from treadle.nn.rope import Frequencies
from treadle.quantization.layers import QuantizedEmbedding, QuantizedLinear

CARD = Card(
    id="inf.compile",
    paper="Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Kwon et al. 2023, PagedAttention",
    summary="Native kernels for processors: weights in 4 or 8 bits, paged cache, one call a pass.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --device native",
    oracle="tests/inference/test_inference_native.py::test_logits_are_those_of_the_dense_model",
)

STRIP = 16
Blocks = tuple[UInt8[Tensor, "out b"], str]
"""A weight as bytes, and the name of their format."""
Find = Callable[[str], Blocks | None]
"""The blocks in which a parameter is stored already, if it is."""


class NativeRunner(Runner):
    """A Llama-shaped decoder in native code.

    Args:
        format: of the layers' weights, one of Q4_0, Q4_1, Q8_0. The head (and with it a tied
            embedding) is always Q8_0, for 4 bits there cost the most quality.
        pages: how many; None for four sequences of full length.
        page: tokens in a page, a multiple of 16.
        threads: None for every core that this process may use.
        find: weights that are stored in blocks already and need no rounding.

    Raises:
        TreadleError: the model has a part that only the torch path runs; names it. Or there is no
            compiler.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        format: str = "Q4_1",
        pages: int | None = None,
        page: int = 32,
        threads: int | None = None,
        find: Find = lambda name: None,
        flags: tuple[str, ...] = (),
    ) -> None:
        if format not in FORMATS:
            raise TreadleError(f"format {format}: the native path has {', '.join(FORMATS)}")
        if page < 1 or page % 16:
            raise TreadleError(f"page={page}: native pages hold a multiple of 16 tokens")
        frequencies = frequencies_of(model.config)
        shape = native_shape(model.config, page, frequencies)
        self.page, self.context, self.vocab = page, shape.context, shape.vocab
        self.pages = pages or 4 * -(-shape.context // page)
        part = page * shape.head_dim
        self.cache = torch.zeros(
            self.pages, shape.layers, shape.kv_heads, 2, part, dtype=torch.float16
        )
        """Of each page, layer and head: keys [head_dim, page], then values [page, head_dim]."""
        self.format, self._flags = format, flags
        self._library = library(*flags)
        self._matrices = _matrices(model, shape, format, find, flags)
        self._norms = _norms(model)
        self._frequencies: Frequencies = frequencies
        self._handle: int | None = self._library.treadle_decoder(
            shape,
            threads or machine()["cores"],
            (ctypes.c_void_p * len(self._matrices))(*(m.handle for m in self._matrices)),
            (ctypes.c_void_p * len(self._norms))(*(n.data_ptr() for n in self._norms)),
            frequencies.inverse.data_ptr(),
            self.cache.data_ptr(),
        )
        if self._handle is None:
            raise TreadleError("the native decoder got no memory or threads; free some")
        weakref.finalize(self, self._library.treadle_free_decoder, self._handle)

    @staticmethod
    def open(
        path: StrPath, *, format: str | None = None, pages: int | None = None, page: int = 32
    ) -> NativeRunner:
        """The model of a file or folder.

        Args:
            format: to which layers are rounded that are stored otherwise; None rounds none, so all
                must lie in one of Q4_0, Q4_1 and Q8_0 in a GGUF file, whose bytes are taken.

        Raises:
            TreadleError: `format` is None and layers are stored in several formats or in another.
        """
        model = load_model(path, dtype=torch.float32).model
        stored = _stored(model, Path(path)) if Path(path).suffix == ".gguf" else {}
        if format is None:
            format = _one_format(model, stored, where=str(path))
        return NativeRunner(model, format=format, pages=pages, page=page, find=stored.get)

    @torch.no_grad()
    def run(self, batch: Batch) -> Float[Tensor, "N V"]:
        self._check(batch)
        logits = torch.empty(sum(batch.outputs), self.vocab)
        at = list(accumulate((len(table) for table in batch.tables), initial=0))
        arrays = [
            np.asarray(values, dtype=np.int32)
            for values in (batch.tokens, batch.counts, batch.starts, batch.outputs)
        ]
        arrays.append(np.fromiter(chain.from_iterable(batch.tables), np.int32, at[-1]))
        arrays.append(np.asarray(at[:-1], dtype=np.int32))
        pointers = [array.ctypes.data for array in arrays]
        done = self._library.treadle_run(
            self._handle, Pass(len(batch.counts), *pointers, logits.data_ptr())
        )
        if done == 2:
            raise TreadleError("a native runner does not outlive a fork; make one in the child")
        if done:
            raise TreadleError("no memory for this pass; read prompts in smaller pieces")
        return logits

    def _check(self, batch: Batch) -> None:
        """Native code would read and write wherever a wrong number points."""
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
            if not all(0 <= number < self.pages for number in table):
                raise TreadleError(f"a page outside 0 .. {self.pages - 1}")

    def copy(self, source: int, target: int) -> None:
        self.cache[target].copy_(self.cache[source])

    def save(self, page: int) -> Tensor:
        return self.cache[page].clone()

    def load(self, page: int, content: Tensor) -> None:
        self.cache[page].copy_(content)


def _stored(model: DecoderModel, file: Path) -> dict[str, Blocks]:
    """Parameters that the file holds in a format of ours, in our order of rows."""
    gguf = GGUFFile.open(file)
    spelling = family_of_gguf(read_header(gguf).architecture)
    found: dict[str, Blocks] = {}
    for rule in applicable(model, spelling.rules(model.config)):
        formats = {gguf.tensors[name].format for name in rule.theirs}
        if len(formats) == 1 and (format := formats.pop()) in FORMATS:
            ours = rule.map.read(tuple(gguf.raw(name) for name in rule.theirs))
            found.update((name, (t, format)) for name, t in zip(rule.ours, ours, strict=True))
    return found


def _one_format(model: DecoderModel, stored: Mapping[str, Blocks], *, where: str) -> str:
    """The format in which all matrices of the layers are stored."""
    matrices = [n for n, p in model.blocks.named_parameters(prefix="blocks") if p.ndim == 2]
    found = {stored[name][1] if name in stored else "others" for name in matrices}
    if len(found) > 1 or found == {"others"}:
        raise TreadleError(
            f"{where}: its layers are stored in {' and '.join(sorted(found))}; the native path "
            f"runs one of {', '.join(FORMATS)}: name one as `format` to have them rounded to it"
        )
    return found.pop()


def _norms(model: DecoderModel) -> list[Float[Tensor, " D"]]:
    """The last, then both of each layer, in float32."""
    norms = [model.norm]
    for block in model.blocks:
        assert isinstance(block, BlockLayer)
        assert block.ffn_norms is not None
        norms += [block.mixer_norms.before, block.ffn_norms.before]
    gains = []
    for norm in norms:
        assert isinstance(norm, RMSNormLayer)
        gains.append((norm.weight.detach().float() + norm.config.offset).contiguous())
    return gains


def _dense(model: DecoderModel, name: str) -> Float[Tensor, "out in"]:
    module = model.get_submodule(name)
    if isinstance(module, QuantizedEmbedding):
        return module.weight.dense(torch.float32)
    return module.weight if isinstance(module, nn.Embedding) else weight_of(module)


def _is_tied(model: DecoderModel) -> bool:
    head = model.head
    return isinstance(head, nn.Linear | QuantizedLinear) and head.weight is model.embedding.weight


def _matrices(
    model: DecoderModel, shape: Shape, format: str, find: Find, flags: tuple[str, ...]
) -> list[NativeMatrix]:
    """Embedding and head, then of each layer q with k and v, o, gate with up, down."""

    def blocks(name: str, format: str) -> UInt8[Tensor, "out b"]:
        stored, kept = find(f"{name}.weight") or (None, format)
        if stored is not None and kept == format:
            return stored
        if stored is not None:
            dense = dequantise(stored, block_format(kept))
        else:
            dense = _dense(model, name)
        return quantise(dense.detach().float(), block_format(format))

    def matrix(data: Tensor, format: str = format) -> NativeMatrix:
        return NativeMatrix(data, format, *flags)

    embedding = matrix(blocks("embedding", "Q8_0"), "Q8_0")
    head = embedding if _is_tied(model) else matrix(blocks("head", "Q8_0"), "Q8_0")
    matrices = [embedding, head]
    heads = (shape.kv_heads, shape.head_dim)
    for layer in range(shape.layers):
        mixer, ffn = (f"blocks.{layer}.{part}" for part in ("mixer", "ffn"))
        q, k, v = (blocks(f"{mixer}.{n}", format) for n in "qkv")
        kv = torch.stack((k.unflatten(0, heads), v.unflatten(0, heads)), 1).flatten(0, 2)
        gate, up = (blocks(f"{ffn}.{n}", format).unflatten(0, (-1, STRIP)) for n in ("gate", "up"))
        matrices += [
            matrix(torch.cat((q, kv))),
            matrix(blocks(f"{mixer}.o", format)),
            matrix(torch.stack((gate, up), 1).flatten(0, 2)),
            matrix(blocks(f"{ffn}.down", format)),
        ]
    return matrices
