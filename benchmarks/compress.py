"""What compression of a prompt costs in quality, on SmolLM2-135M and abstracts of papers (SciTLDR).

How likely is the summary that a person wrote, behind what is left of the abstract: of its tokens
the surprising ones (`CompressPrompt`), as many at random, or as many from its beginning. The model
by itself, without any abstract, is the other end of the scale.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
from itertools import islice
from pathlib import Path

from common import DATA

from treadle.cli.voice import engine_of
from treadle.inference.compress import CompressPrompt
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling

RATES = (0.75, 0.5, 0.33)
QUESTION = "\n\nThe paper in one sentence:"


def abstracts(count: int) -> list[tuple[str, str]]:
    """With their summaries."""
    with gzip.open(DATA / "sft" / "scitldr_A_dev.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in islice(file, count)]
    return [(" ".join(row["source"]), row["target"][0]) for row in rows]


def left(engine: Engine, way: str, rate: float, tokens: list[int], seed: int) -> list[int]:
    """What one way of compression leaves of a text."""
    count = math.ceil(rate * len(tokens))
    if way == "surprising":
        return CompressPrompt(rate=rate)(engine, tokens)
    if way == "beginning":
        return tokens[:count]
    kept = sorted(random.Random(seed).sample(range(len(tokens)), count))
    return [tokens[i] for i in kept]


def surprise(engine: Engine, body: list[int], summary: str) -> tuple[float, int]:
    """Nats of the summary behind a text and the question, and its tokens."""
    encode = engine.tokenizer.encode
    asked, said = encode(QUESTION, parse_special=False), encode(" " + summary, parse_special=False)
    prompt = (*body, *asked, *said)
    request = Request(prompt, Sampling(max_tokens=1, temperature=0.0), prompt_logprobs=0)
    ((completion,),) = engine.generate([request])
    return -sum(reading.logprob for reading in completion.prompt[-len(said) :]), len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="native")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engine = engine_of("smollm2-135m-instruct", args.device)
    rows = abstracts(args.texts)
    kinds = [("whole", 1.0), ("nothing", 0.0)]
    kinds += [(way, r) for r in RATES for way in ("surprising", "random", "beginning")]
    results = []
    for way, rate in kinds:
        lengths, nats, tokens, each = [], 0.0, 0, []
        for seed, (text, summary) in enumerate(rows):
            body = engine.tokenizer.encode(text, parse_special=False)
            if way == "nothing":
                body = []
            elif way != "whole":
                body = left(engine, way, rate, body, seed)
            found, count = surprise(engine, body, summary)
            lengths.append(len(body))
            nats, tokens = nats + found, tokens + count
            each.append(found / count)
        error = statistics.stdev(each) / math.sqrt(len(each))
        results.append(
            {
                "kept": way,
                "rate": rate,
                "prompt tokens": statistics.mean(lengths),
                "perplexity": math.exp(nats / tokens),
                "nats a token, standard error": error,
            }
        )
        print(
            f"{way:10} {rate:.2f}  {statistics.mean(lengths):6.1f} tokens  "
            f"perplexity {math.exp(nats / tokens):7.2f}  (nats {nats / tokens:.3f} +- {error:.3f})",
            flush=True,
        )
    if args.out is not None:
        found = {"device": args.device, "texts": len(rows), "ways": results}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
