"""Decoding on a GPU: every way against the processor's texts, then timed beside vLLM."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from common import model_folder
from gpu_ledger import Ledger, opened, seconds

from treadle.inference.decode import Compiled, Decode, Eager, Graphs
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.page_attention import PageAttention, TorchPages, TritonPages
from treadle.inference.paged_memory import PagesOnly
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.quantization.float8 import DynamicFloat8, Float8


def ways(args: argparse.Namespace) -> Iterator[tuple[str, Decode, PageAttention]]:
    for attention in (TorchPages(), TritonPages()):
        yield f"eager, {type(attention).__name__}", Eager(), attention
        yield f"compiled, {type(attention).__name__}", Compiled(), attention
        if args.device != "cpu":
            for over in (Eager(), Compiled()):
                label = f"graphs over {type(over).__name__}, {type(attention).__name__}"
                yield label, Graphs(over=over), attention


def requests(batch: int, prompt: int, tokens: int, vocab: int) -> list[Request]:
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    return [
        Request(tuple((7 * i + 13 * j) % (vocab - 10) for i in range(prompt)), sampling)
        for j in range(batch)
    ]


def decoding(args: argparse.Namespace, ledger: Ledger) -> None:
    model, tokenizer = opened(args)
    tokenizer.__dict__["stop_ids"] = frozenset()  # every path writes all that is asked for
    prompt, tokens = (20, 6) if args.quick else (128, 128)
    given = requests(4, prompt, tokens, model.config.vocab)
    exact = Engine(model, tokenizer, EngineConfig(slots=4)).generate(given)
    kept = {
        "float32": (1e-3, lambda m: m),
        "bfloat16": (0.5, lambda m: m.to(torch.bfloat16)),
        "float8": (1.0, lambda m: Float8()(m.to(torch.bfloat16))),
        "float8 products": (1.0, lambda m: Float8(kernel=DynamicFloat8())(m.to(torch.bfloat16))),
    }
    for numbers, (limit, change) in kept.items():
        placed = change(copy.deepcopy(model).requires_grad_(False).to(args.device))
        for label, decode, attention in ways(args):
            name = f"{numbers}, {label}"

            def run(
                name: str = name,
                decode: Decode = decode,
                attention: PageAttention = attention,
                placed: DecoderModel = placed,
                limit: float = limit,
            ) -> None:
                config = EngineConfig(
                    slots=32,
                    decode=decode,
                    cache=PagesOnly(attention=attention),
                    cache_tokens=2**16,
                )
                engine = Engine(placed, tokenizer, config)
                ledger.check(name, difference(exact, engine.generate(given)), limit)
                for batch in (1,) if args.quick else (1, 8, 32):
                    load = requests(batch, prompt, tokens, model.config.vocab)
                    read = requests(batch, prompt, 1, model.config.vocab)
                    whole, first = (
                        seconds(
                            lambda r=r: engine.generate(r), torch.device(args.device), args.rounds
                        )
                        for r in (load, read)
                    )
                    rate = batch * (tokens - 1) / max(whole - first, 1e-9)
                    ledger.time(f"{name}, batch {batch}", decode=rate)

            ledger.attempt(name, run)
    if find_spec("vllm") is not None and args.model != "tiny":
        ledger.attempt("vllm", lambda: vllm(ledger, given, tokens))


def difference(exact: list[Any], found: list[Any]) -> float:
    """Largest difference of log-probabilities while the texts are equal; where they part, the
    tokens' own, as both were the likeliest in their eyes."""
    worst = 0.0
    for (one,), (other,) in zip(exact, found, strict=True):
        for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
            worst = max(worst, abs(p - q))
            if a != b:
                break
    return worst


def vllm(ledger: Ledger, given: list[Request], tokens: int) -> None:
    from vllm import LLM, SamplingParams

    peer = LLM(str(model_folder()), dtype="bfloat16", gpu_memory_utilization=0.3)
    for batch in (1, 8, 32):
        load = [{"prompt_token_ids": list(given[i % len(given)].prompt)} for i in range(batch)]

        def write(count: int, load: list[Any] = load) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            peer.generate(load, params, use_tqdm=False)

        device = torch.device("cuda")
        whole, first = (seconds(lambda n=n: write(n), device, 3) for n in (tokens, 1))
        rate = batch * (tokens - 1) / max(whole - first, 1e-9)
        ledger.time(f"vLLM, bfloat16, batch {batch}", decode=rate)
