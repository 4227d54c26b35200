"""Greedy decoding and prefill of SmolLM2-135M: treadle's engine beside transformers' generate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import race
from common import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")


def prompts(args: argparse.Namespace) -> list[list[int]]:
    return [
        [(7 * i + 13 * j) % 40_000 + 500 for i in range(args.prompt)] for j in range(args.batch)
    ]


def figures(args: argparse.Namespace, prefill: float, whole: float) -> Mapping[str, float]:
    return {
        "decode tok/s": args.batch * (args.tokens - 1) / (whole - prefill),
        "prefill tok/s": args.batch * args.prompt / prefill,
    }


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    import torch

    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.request import Request
    from treadle.inference.sampling import Sampling
    from treadle.models.hub.load import load_model
    from treadle.tokenizers.tokenizer import Tokenizer

    model = load_model(model_folder(), dtype=getattr(torch, args.dtype)).model.eval()
    tokenizer = Tokenizer.load(model_folder())
    # The peer cannot stop early either: both write every token that is asked for.
    tokenizer.__dict__["stop_ids"] = frozenset()
    engine = Engine(model, tokenizer, EngineConfig(slots=args.batch, prefill_tokens=100_000))

    def run(tokens: int) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=tokens)
        engine.generate([Request(tuple(p), sampling) for p in prompts(args)])

    return timed(args, run)


def transformers(args: argparse.Namespace) -> Mapping[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=getattr(torch, args.dtype))
    model.eval()
    ids = torch.tensor(prompts(args))

    @torch.inference_mode()
    def run(tokens: int) -> None:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == args.prompt + tokens

    return timed(args, run)


def timed(args: argparse.Namespace, run) -> Mapping[str, float]:
    prefill, whole = race.Clock(), race.Clock()
    for _ in range(4):
        with prefill.lap():
            run(1)
    for _ in range(3):
        with whole.lap():
            run(args.tokens)
    return figures(args, prefill.seconds, whole.seconds)


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "transformers": transformers},
        name=lambda args: f"decode_{args.dtype}_batch{args.batch}",
        unit="tokens a second",
        add_arguments=add_arguments,
    )
