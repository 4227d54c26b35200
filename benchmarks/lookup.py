"""Prompt lookup on text that repeats itself: greedy decoding with and without guesses.

The requests ask SmolLM2-135M to give a text back: a paragraph, a list, code with a comment.
Both texts must be the same; the ratio is that of tokens a second behind the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from treadle.cli.voice import engine_of
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.speculative import NGram
from treadle.tokenizers.chat import encode_prompt

CODE = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("a side is negative")
    return width * height


def perimeter(width, height):
    if width < 0 or height < 0:
        raise ValueError("a side is negative")
    return 2 * (width + height)
"""
TEXT = """The loom is a device for weaving cloth. Its threads are of two kinds: the warp, which is \
held under tension, and the weft, which is passed over and under the warp. On a treadle loom the \
weaver raises the warp with the feet, so that both hands are free to throw the shuttle."""
LIST = "\n".join(f"{i}. Move box {i} from shelf {i} to shelf {i + 1}." for i in range(1, 13))
TASKS = {
    "code": f"Repeat this code with one more comment at its top:\n\n{CODE}",
    "text": f"Copy the following text word for word:\n\n{TEXT}",
    "list": f"Copy the following list:\n\n{LIST}",
}


def seconds(engine: Engine, prompt: tuple[int, ...], tokens: int) -> tuple[float, tuple[int, ...]]:
    """Time from the first token to the last, and the text's tokens."""
    engine.submit(Request(prompt, Sampling(temperature=0.0, max_tokens=tokens)))
    (sequence,) = engine.step()
    start = time.perf_counter()
    while sequence.finish is None:
        engine.step()
    return time.perf_counter() - start, tuple(sequence.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="native")
    parser.add_argument("--guesses", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draft = NGram(tokens=args.guesses, longest=4, shortest=2)
    plain, guessing = (
        engine_of("smollm2-135m-instruct", args.device, EngineConfig(draft=d))
        for d in (None, draft)
    )
    results = {}
    for name, text in TASKS.items():
        turns = [{"role": "user", "content": text}]
        prompt = tuple(encode_prompt(plain.tokenizer, turns))
        speeds: dict[str, list[float]] = {"plain": [], "lookup": []}
        same = True
        guessed, accepted = guessing.guessed, guessing.accepted
        for _ in range(args.rounds):
            slow, first = seconds(plain, prompt, args.tokens)
            fast, second = seconds(guessing, prompt, args.tokens)
            same = same and first == second
            speeds["plain"].append((len(first) - 1) / slow)
            speeds["lookup"].append((len(second) - 1) / fast)
        a, b = (statistics.median(found) for found in speeds.values())
        results[name] = {
            "plain": a,
            "lookup": b,
            "ratio": b / a,
            "accepted": (guessing.accepted - accepted) / max(1, guessing.guessed - guessed),
            "tokens": len(first),
            "same text": same,
        }
        print(name, results[name])
    if args.out is not None:
        conditions = {"device": args.device, "guesses": args.guesses, "rounds": args.rounds}
        args.out.write_text(json.dumps({**conditions, "tasks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
