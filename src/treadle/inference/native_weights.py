"""Where the native runner's weights come from: the blocks of a GGUF file, or a model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.errors import TreadleError
from treadle.core.files import StrPath, sha256
from treadle.inference.prefix_folder import fingerprint
from treadle.kernels.blocks import block_format, dequantise, quantise
from treadle.kernels.native.matrix import FORMATS, Arena, NativeMatrix, runnable
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.families import family_of_gguf
from treadle.models.hub.fill import applicable, check, expected_shapes
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.gguf_header import ROPE_DIVISORS
from treadle.models.hub.load import read_header
from treadle.models.outline import outline
from treadle.models.weights import Rule
from treadle.nn.linear import weight_of
from treadle.quantization.layers import QuantizedEmbedding

OUTER = "Q8_0"
"""To what embedding and head are rounded if they must be: 4 bits there cost the most quality."""


class NativeWeights(ABC):
    """A shape: gives the parameters of a decoder, by treadle's names."""

    decoder: Decoder

    @abstractmethod
    def format_of(self, name: str) -> str:
        """The format in which the matrix `name` will be packed.

        Raises:
            TreadleError: it would have to be rounded, and nobody said to what.
        """

    @abstractmethod
    def matrix(self, name: str, arena: Arena) -> NativeMatrix:
        """The matrix `name`, packed; several threads call this at once."""

    @abstractmethod
    def vector(self, name: str) -> Float[Tensor, " n"] | None:
        """The vector `name` in float32, or None where the model has none."""

    @abstractmethod
    def mark(self, page: int) -> str:
        """Equal where pages of `page` tokens are interchangeable."""


class RoundedModel(NativeWeights):
    """A model in memory, its matrices rounded to `format`, embedding and head to Q8_0.

    Raises:
        TreadleError: the native path does not run `format`.
    """

    def __init__(self, model: DecoderModel, format: str) -> None:
        self.decoder, self.model, self.format = model.config, model, runnable(format)
        self._parameters = dict(model.named_parameters())

    def format_of(self, name: str) -> str:
        return self.format if name.startswith("blocks.") else OUTER

    @torch.no_grad()
    def matrix(self, name: str, arena: Arena) -> NativeMatrix:
        format = self.format_of(name)
        dense = self._dense(name.removesuffix(".weight")).float()
        return NativeMatrix(quantise(dense, block_format(format)), format, arena)

    def vector(self, name: str) -> Float[Tensor, " n"] | None:
        found = self._parameters.get(name)
        return None if found is None else found.detach().float()

    def mark(self, page: int) -> str:
        return fingerprint(self.model, page, nullcontext, f"native {self.format}")

    def _dense(self, name: str) -> Float[Tensor, "out in"]:
        module = self.model.get_submodule(name)
        if isinstance(module, QuantizedEmbedding):
            return module.weight.dense(torch.float32)
        return module.weight if isinstance(module, nn.Embedding) else weight_of(module)


class StoredFile(NativeWeights):
    """A GGUF file, whose blocks are taken as they are.

    Args:
        format: to which the matrices are rounded that are stored in a format which the native
            path does not run; embedding and head to Q8_0. None: there must be none.

    Raises:
        TreadleError: no such file, or the native path does not run `format`.
        FileFormatError: the file is broken.
    """

    def __init__(self, path: StrPath, format: str | None = None) -> None:
        self.file = GGUFFile.open(path)
        header = read_header(self.file)
        spelling = family_of_gguf(header.architecture)
        self.decoder = spelling.read(header)
        self.format = None if format is None else runnable(format)
        model = outline(self.decoder)
        rules = applicable(model, spelling.rules(self.decoder))
        check(
            expected_shapes(model, rules),
            {name: shape for name, shape in header.shapes.items() if name != ROPE_DIVISORS},
            where=f"{path}: not a model of {header.architecture} as its metadata say",
        )
        self._rules = {ours: rule for rule in rules for ours in rule.ours}

    @property
    def formats(self) -> tuple[str, ...]:
        """In which the matrices will be packed, each once.

        Raises:
            TreadleError: as `format_of`.
        """
        infos = {name: self.file.tensors[rule.theirs[0]] for name, rule in self._rules.items()}
        return tuple(sorted({self.format_of(n) for n, i in infos.items() if len(i.shape) > 1}))

    def format_of(self, name: str) -> str:
        if (stored := self._stored(name)) in FORMATS:
            return stored
        if self.format is None:
            theirs = self._rules[name].theirs[0]
            raise TreadleError(
                f"{self.file.path}: {theirs} is stored as {stored}; the native path runs "
                f"{', '.join(FORMATS)}: name one as `format` to have it rounded to that"
            )
        return self.format if name.startswith("blocks.") else OUTER

    def matrix(self, name: str, arena: Arena) -> NativeMatrix:
        rule, stored, format = self._rules[name], self._stored(name), self.format_of(name)
        raw = self._read(rule, name, tuple(self.file.raw(n) for n in rule.theirs))
        if stored != format:
            dense = dequantise(raw, block_format(stored))
            raw = quantise(dense, block_format(format))
        packed = NativeMatrix(raw, format, arena)
        for theirs in rule.theirs:
            self.file.release(theirs)
        return packed

    def vector(self, name: str) -> Float[Tensor, " n"] | None:
        if (rule := self._rules.get(name)) is None:
            return None
        return self._read(rule, name, tuple(self.file.read(n) for n in rule.theirs))

    def mark(self, page: int) -> str:
        return f"{sha256(self.file.path)[:32]}-native-{self.format}-{page}"

    def _read(self, rule: Rule, name: str, theirs: tuple[Tensor, ...]) -> Tensor:
        """Maps of GGUF move rows, so they serve bytes as well as numbers."""
        return rule.map.read(theirs)[rule.ours.index(name)]

    def _stored(self, name: str) -> str:
        return self.file.tensors[self._rules[name].theirs[0]].format
