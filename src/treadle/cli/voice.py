"""A model behind the engine, as the commands use it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from treadle.cli.models import open_model

if TYPE_CHECKING:
    from treadle.cli.talk import Message
    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.request import Delta
    from treadle.inference.sampling import Sampling

NATIVE = "native"


def engine_of(target: str, device: str, config: EngineConfig | None = None) -> Engine:
    """An engine with the model that `target` names, on a torch device or in native kernels.

    Raises:
        TreadleError: there is no such model or device, or the native kernels cannot run it.
    """
    import torch

    from treadle.core.errors import TreadleError
    from treadle.inference.engine import Engine, EngineConfig
    from treadle.tokenizers.load import tokenizer_of

    opened = open_model(target)
    if device == NATIVE:
        if config is not None and config.cache is not None:
            raise TreadleError(
                "the native kernels keep keys and values in pages of their own: leave --cache out"
            )
        from treadle.inference.native_runner import NativeRunner
        from treadle.peft.adapter import merge

        runner = NativeRunner(merge(opened.model), format="Q8_0")
        torch.set_num_threads(1)  # torch's own threads would fight with the runner's
        return Engine.of_runner(runner, tokenizer_of(opened), config or EngineConfig())
    try:
        model = opened.model.requires_grad_(False).eval().to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise TreadleError(f"device `{device}` cannot be used: {error}") from None
    return Engine(model, tokenizer_of(opened), config or EngineConfig())


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
