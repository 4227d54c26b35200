"""`treadle generate`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from treadle.cli.chat import Device, MaxTokens, Model, Seed, Temperature, TopP
from treadle.cli.command import Command


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(help="Text to continue; - reads one prompt from standard input.")
    ] = "-",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn.")] = False,
    n: Annotated[int, typer.Option("-n", min=1, help="Continuations.")] = 1,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends it.")] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", help="The text is JSON that this accepts.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="The text matches this expression.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Continue a text."""
    from treadle.cli.voice import engine_of
    from treadle.inference.constrained import JsonSchema, Language, Regex
    from treadle.inference.request import Request
    from treadle.inference.sampling import Sampling
    from treadle.tokenizers.chat import encode_prompt

    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    language: Language | None = Regex(pattern=regex) if regex else None
    if json_schema is not None:
        language = JsonSchema(text=json_schema)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    engine = engine_of(model, device)
    if chat:
        tokens = encode_prompt(engine.tokenizer, [{"role": "user", "content": text}])
    else:
        tokens = engine.tokenizer.encode(text, add_special=True)
    constraint = language.build(engine.tokenizer, engine.runner.vocab) if language else None
    request = Request(tuple(tokens), sampling, n=n, constraint=constraint)
    (completions,) = engine.generate([request])
    for completion in completions:
        if as_json:
            row = {
                "text": completion.text,
                "tokens": len(completion.tokens),
                "finish": completion.finish,
                "logprob": sum(completion.logprobs),
            }
            typer.echo(json.dumps(row, ensure_ascii=False))
        else:
            typer.echo(completion.text)


COMMAND = Command(
    name="generate",
    run=generate,
    examples=(
        "treadle generate smollm2-135m-instruct 'The loom was'",
        "treadle generate runs/quickstart 'What is 17 + 25?' --chat -n 4 --temperature 1",
        "treadle generate smollm2-135m-instruct --json < prompt.txt",
    ),
)
