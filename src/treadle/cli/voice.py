"""A model behind the engine, as the commands use it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import typer

from treadle.cli.models import file_of, open_model
from treadle.cli.numbers import Numbers

if TYPE_CHECKING:
    from pathlib import Path

    from treadle.cli.talk import Message
    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.request import Delta
    from treadle.inference.sampling import Sampling
    from treadle.models.decoder import Decoder
    from treadle.models.source import Opened

AUTO, NATIVE = "auto", "native"


def engine_of(
    target: str,
    device: str,
    config: EngineConfig | None = None,
    numbers: Numbers = Numbers(),
) -> Engine:
    """An engine with the model that `target` names.

    Args:
        device: a torch device; `native` for the native kernels, which round what is not stored in
            few bits to 8; `auto` for them where they run a file as it is stored, else `on_torch`.
        numbers: of the weights on a torch device.

    Raises:
        TreadleError: there is no such model or device, or the native kernels cannot run it, or not
            in these numbers.
    """
    from treadle.core.errors import TreadleError

    if numbers.given and device == AUTO:
        _say("no native kernels: they keep weights as they are stored")
        device = on_torch(device)
    if numbers.given and device == NATIVE:
        raise TreadleError(
            "the native kernels keep weights as they are stored, or in 8 bits: leave --dtype and "
            "--quantize out, or take another --device"
        )
    file = file_of(target) if device in (AUTO, NATIVE) else None
    engine = _as_stored(file, device, config) if file else None
    return engine or engine_with(open_model(target), on_torch(device), config, numbers)


def on_torch(device: str) -> str:
    """`device`; for `auto` a GPU if there is one, else the processor."""
    import torch

    if device != AUTO:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _as_stored(file: Path, device: str, config: EngineConfig | None) -> Engine | None:
    """The engine of a file whose bytes the native kernels take; the model is never unpacked."""
    from treadle.inference.decode import Eager
    from treadle.inference.limits import EngineConfig
    from treadle.inference.native_choice import native_engine, native_support
    from treadle.tokenizers.tokenizer import Tokenizer

    config = config or EngineConfig()
    if device == AUTO and config.cache is not None:
        _say("no native kernels: they keep keys and values in pages of their own")
        return None
    if device == AUTO and not isinstance(config.decode, Eager):
        _say("no native kernels: they run a pass in one call already")
        return None
    found = native_support(file)
    if found.weights is None:
        if device == AUTO:
            _say(f"no native kernels: {found.why}")
        return None
    _say(f"native kernels: {found.why}")
    tokenizer = Tokenizer.from_gguf(found.weights.file.metadata)
    return native_engine(found.weights, tokenizer, config)


def engine_with(
    opened: Opened,
    device: str,
    config: EngineConfig | None = None,
    numbers: Numbers = Numbers(),
) -> Engine:
    """An engine with a model that is open already, on a torch device or in native kernels.

    Raises:
        TreadleError: there is no such device, or the native kernels cannot run the model.
    """
    from treadle.inference.engine import Engine, EngineConfig
    from treadle.models.decoder import is_causal
    from treadle.models.heads import TaskHead
    from treadle.models.hub.sentence import with_vectors
    from treadle.tokenizers.load import tokenizer_of

    if not is_causal(opened.model.config) and not isinstance(opened.model.head, TaskHead):
        with_vectors(opened)  # all that an encoder without a head can be asked for
    tokenizer, config = tokenizer_of(opened), config or EngineConfig()
    if device == NATIVE:
        from treadle.inference.native_choice import native_engine
        from treadle.inference.native_weights import RoundedModel
        from treadle.peft.adapter import merge

        _say("native kernels: weights rounded to Q8_0")
        return native_engine(RoundedModel(merge(opened.model), "Q8_0"), tokenizer, config)
    return Engine(numbers.put(opened.model, device), tokenizer, config)


def decoder_of(engine: Engine) -> Decoder:
    """The architecture of the model behind an engine of `engine_of`."""
    from treadle.inference.native_runner import NativeRunner
    from treadle.inference.torch_runner import TorchRunner

    runner = engine.runner
    if isinstance(runner, NativeRunner):
        return runner.decoder
    assert isinstance(runner, TorchRunner)
    return runner.model.config


def place_of(engine: Engine) -> str:
    """Where an engine of `engine_of` computes: `native`, or a torch device."""
    from treadle.inference.native_runner import NativeRunner
    from treadle.inference.torch_runner import TorchRunner

    if isinstance(engine.runner, NativeRunner):
        return NATIVE
    assert isinstance(engine.runner, TorchRunner)
    return str(engine.runner.device)


def _say(line: str) -> None:
    typer.secho(f"({line})", dim=True, err=True)


class EngineVoice:
    """Answers conversations with an engine."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling

    def fits(self, messages: Sequence[Message]) -> bool:
        context = self.engine.runner.context
        reserve = min(self.sampling.max_tokens, context // 4)
        return len(self._prompt(messages)) + reserve <= context

    def answer(self, messages: Sequence[Message]) -> Generator[Delta]:
        from treadle.inference.request import Request

        yield from self.engine.stream(Request(self._prompt(messages), self.sampling))

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        from treadle.tokenizers.chat import encode_prompt

        return tuple(encode_prompt(self.engine.tokenizer, messages))
