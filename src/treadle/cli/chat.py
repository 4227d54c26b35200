"""`treadle chat`, and the options of every command that generates."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.command import Command
from treadle.cli.kinds import CacheKind, DecodeKind, DraftKind, limits_of
from treadle.cli.numbers import Dtype, Numbers, Quantize

Model = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, a model, a hub id or a file.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest of this total chance.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same text.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, mps; native: C++ kernels for CPUs, 8 bits or as stored; "
        "auto: native for GGUF files in few bits.",
    ),
]


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    cache: CacheKind = None,
    draft: DraftKind = None,
    decode: DecodeKind = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = "auto",
) -> None:
    """Talk with a model in the terminal. /help lists what can be typed besides text."""
    from treadle.cli.talk import at_terminal
    from treadle.cli.voice import EngineVoice, engine_of
    from treadle.inference.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    limits = limits_of(cache, draft, decode)
    engine = engine_of(model, device, limits, Numbers(dtype, quantize))
    _ = engine.tokenizer.chat  # a model without a chat template is refused before the first word
    at_terminal(EngineVoice(engine, sampling), system).run()


COMMAND = Command(
    name="chat",
    run=chat,
    examples=(
        "treadle chat smollm2-135m-instruct",
        "treadle chat runs/quickstart --system 'Answer in one sentence.'",
        "echo 'What is a loom?' | treadle chat smollm2-135m-instruct --temperature 0",
    ),
)
