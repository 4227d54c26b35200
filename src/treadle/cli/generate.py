"""`treadle generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.chat import Device, MaxTokens, Model, Seed, Temperature, TopP
from treadle.cli.command import Command
from treadle.cli.kinds import CacheKind, DecodeKind, DraftKind, limits_of
from treadle.cli.numbers import Dtype, Numbers, Quantize
from treadle.cli.parallel import (
    Experts,
    TensorParallel,
    engine_over,
    told_of_experts,
    told_of_guesses,
)
from treadle.cli.voice import on_torch


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
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Continue by this adapter or prefix; repeatable."),
    ] = None,
    route: Annotated[
        Path | None,
        typer.Option(
            help="Choose among the adapters for the prompt: JSON lines of `adapter` and `prompt`."
        ),
    ] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Search with so many beams; -n of them are told.")
    ] = None,
    beam_groups: Annotated[
        int, typer.Option(min=1, help="Groups of beams that part from each other.")
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Above 0 beams favour long texts, below 0 short ones.")
    ] = 1.0,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many and tell the likeliest -n of them."),
    ] = None,
    compress: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Keep this share of all but the prompt's last paragraph."
        ),
    ] = None,
    cache: CacheKind = None,
    draft: DraftKind = None,
    decode: DecodeKind = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    experts: Experts = None,
    tensor_parallel: TensorParallel = 1,
    device: Device = "auto",
) -> None:
    """Continue a text."""
    from treadle.core.errors import TreadleError
    from treadle.inference.attach import placed
    from treadle.inference.beam import BeamSearch
    from treadle.inference.best_of import BestOf
    from treadle.inference.compress import CompressPrompt, compress_text
    from treadle.inference.constrained import JsonSchema, Language, Regex
    from treadle.inference.request import Request
    from treadle.inference.route import Chooser, read_examples
    from treadle.inference.sampling import Sampling
    from treadle.tokenizers.chat import encode_prompt

    if beams is not None and best_of is not None:
        raise TreadleError("--beams and --best-of are two searches: leave one out")
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
    limits = limits_of(cache, draft, decode)
    if adapter or experts or tensor_parallel > 1:
        device = on_torch(device)
    numbers = Numbers(dtype, quantize)
    with engine_over(
        model, device, limits, processes=tensor_parallel, experts=experts, numbers=numbers
    ) as engine:
        if compress is not None:
            text = compress_text(engine, text, CompressPrompt(rate=compress))
        if chat:
            tokens = encode_prompt(engine.tokenizer, [{"role": "user", "content": text}])
        else:
            tokens = engine.tokenizer.encode(text, add_special=True)
        constraint = language.build(engine.tokenizer, engine.runner.vocab) if language else None
        request = Request(tuple(tokens), sampling, n=n, constraint=constraint)
        folders = list(adapter or ())
        if route is not None:
            folders = [Chooser(read_examples(route, folders))(engine, tokens)]
            typer.secho(f"(by {folders[0]})", dim=True, err=True)
        places = [placed(engine, folder) for folder in folders] or [(engine, None)]
        work = [(own, replace(request, adapter=name)) for own, name in places]
        if beams is not None:
            search = BeamSearch(width=beams, groups=beam_groups, length_penalty=length_penalty)
            answers = [search(own, each) for own, each in work]
        elif best_of is not None:
            answers = [BestOf(of=best_of)(own, each) for own, each in work]
        else:
            together = iter(engine.generate([each for own, each in work if own is engine]))
            answers = [
                next(together) if own is engine else own.generate([each])[0] for own, each in work
            ]
        if experts is not None:
            told_of_experts(engine)
        if engine.verified:
            told_of_guesses(engine)
    names: list[str | None] = [*folders] or [None]
    told = [(name, c) for name, answer in zip(names, answers, strict=True) for c in answer]
    for name, completion in told:
        if as_json:
            row = {
                **({} if name is None else {"adapter": name}),
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
        "treadle generate smollm2-135m-instruct 'A loom is' --beams 6 --beam-groups 3 -n 3",
        "treadle generate smollm2-135m-instruct --compress 0.5 < prompt.txt",
        "treadle generate smollm2-135m-instruct 'Dear' --adapter adapters/a --adapter adapters/b",
        "treadle generate smollm2-135m-instruct 'Dear' --adapter adapters/a --adapter adapters/b "
        "--route examples.jsonl",
    ),
)
