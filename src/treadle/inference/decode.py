"""How passes in which every sequence writes one token are computed: a shape.

Most of such a pass, of a small model, is the way from one operator to the next. `Compiled` fuses
operators, `Graphs` lets a GPU go through all of them without being told each one.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.advance import Advance, Autocast, Forward, Ready
from treadle.inference.cache import Cache
from treadle.inference.contiguous import Contiguous
from treadle.inference.cuda_graphs import CudaGraphs, Recorder
from treadle.inference.memory import Memory
from treadle.inference.paged_memory import Paged, PagedMemory, PagesOnly
from treadle.models.decoder import DecoderModel
from treadle.peft.prefix import prefix_of

CARD = Card(
    id="inf.compile.decode",
    paper="Ansel et al. 2024, PyTorch 2; Kwon et al. 2023, PagedAttention, arXiv:2309.06180",
    summary="Decoding compiled whole, or recorded as CUDA graphs, over static tensors.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --device cpu --decode Compiled",
    oracle="tests/inference/test_inference_decode.py::test_compiled_equals_the_model_itself",
)


class Decode(Config):
    """A shape: what becomes of a pass before it runs many times."""

    @abstractmethod
    def build(self, model: DecoderModel, memory: Memory, autocast: Autocast) -> Advance | None:
        """What runs such passes; None: the model as it is.

        Raises:
            ConfigError: the cache, the model or the device is not one for it.
        """

    @abstractmethod
    def cache(self, model: DecoderModel) -> Cache:
        """The cache where none is chosen."""


class Recordable(Decode):
    """A shape: what can be recorded, too."""

    @abstractmethod
    def prepare(self, forward: Forward, inputs: Tensor) -> Ready:
        """The pass over these inputs, as it is to be recorded."""


class Eager(Recordable):
    """An operator at a time."""

    def prepare(self, forward: Forward, inputs: Tensor) -> Ready:
        return partial(forward, inputs)

    def build(self, model: DecoderModel, memory: Memory, autocast: Autocast) -> None:
        return None

    def cache(self, model: DecoderModel) -> Cache:
        return Paged() if prefix_of(model) is None else Contiguous()


class Compiled(Recordable):
    """Compiled whole by torch.compile, once for each number of sequences and length of tables, both
    rounded up to powers of two. On a processor this needs a C++ compiler."""

    def prepare(self, forward: Forward, inputs: Tensor) -> Ready:
        """
        Raises:
            TreadleError: when run for the first time, where the model cannot be compiled whole.
        """
        from torch._dynamo.exc import TorchDynamoException  # a second's import

        # Isolated: each shape is compiled anew, and none counts towards the limit on another's.
        fast: Forward = torch.compile(  # type: ignore[call-overload]
            forward, fullgraph=True, dynamic=False, isolate_recompiles=True
        )

        def run() -> Tensor:
            try:
                return fast(inputs)
            except TorchDynamoException as error:
                reason = str(error).strip().partition("\n")[0]
                raise TreadleError(
                    f"decoding cannot be compiled whole: {reason}; take --decode Eager"
                ) from error

        return run

    def build(self, model: DecoderModel, memory: Memory, autocast: Autocast) -> Advance:
        return Advance(model, _pages_alone(memory, "Compiled"), autocast, self.prepare)

    def cache(self, model: DecoderModel) -> Cache:
        return PagesOnly()


class Graphs(Decode):
    """Recorded as CUDA graphs, once for each such shape, and replayed in one call."""

    over: Recordable = Compiled()
    """What is recorded."""

    def build(self, model: DecoderModel, memory: Memory, autocast: Autocast) -> Advance:
        pages = _pages_alone(memory, "Graphs")
        if pages.device.type != "cuda":
            raise ConfigError(
                f"Graphs records CUDA graphs, and the model is on {pages.device}: take --decode "
                "Compiled, or --device cuda"
            )
        return recorded(model, pages, autocast, CudaGraphs(), self.over)

    def cache(self, model: DecoderModel) -> Cache:
        return PagesOnly()


def recorded(
    model: DecoderModel,
    memory: PagedMemory,
    autocast: Autocast,
    recorder: Recorder,
    over: Recordable,
) -> Advance:
    """Passes that `recorder` plays back, of what `over` makes of them."""
    return Advance(
        model, memory, autocast, lambda f, inputs: recorder.record(over.prepare(f, inputs))
    )


def _pages_alone(memory: Memory, owner: str) -> PagedMemory:
    if not isinstance(memory, PagedMemory) or memory.rows is not None:
        raise ConfigError(
            f"{owner} decoding attends to pages where they lie, and this cache keeps rows: take "
            "--cache PagesOnly or Quantised, or leave it out"
        )
    return memory
