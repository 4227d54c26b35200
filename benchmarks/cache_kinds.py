"""What each kind of cache costs in memory and gives up in quality, on SmolLM2-135M.

Texts of Wikitext-2 are read up to `--prompt` tokens, then the next `--tokens` one by one: the
perplexity of those, the bytes that the cache took, and the time of a token.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from common import DATA

from treadle.evals.wikitext import articles, plain
from treadle.inference.cache import Cache
from treadle.inference.contiguous import Contiguous
from treadle.inference.heavy_hitters import HeavyHitters
from treadle.inference.paged_memory import Paged, PagesOnly
from treadle.inference.quantised import Quantised, Smoothed
from treadle.inference.rolling import Rolling
from treadle.inference.runner import Batch
from treadle.inference.snapkv import SnapKV
from treadle.inference.torch_runner import TorchRunner
from treadle.models.hub.load import load_model
from treadle.models.hub.pull import pull
from treadle.tokenizers.tokenizer import Tokenizer

BUDGET = 128
KINDS: dict[str, Cache] = {
    "paged": Paged(),
    "pages only": PagesOnly(),
    "contiguous": Contiguous(),
    "8 bits": Quantised(bits=8),
    "4 bits": Quantised(bits=4),
    "4 bits, smoothed keys": Quantised(bits=4, keys=Smoothed()),
    f"rolling, {BUDGET - 4} and 4 sinks": Rolling(window=BUDGET - 4, sinks=4),
    f"rolling, {BUDGET}, no sinks": Rolling(window=BUDGET, sinks=0),
    f"H2O, {BUDGET}": HeavyHitters(budget=BUDGET, recent=BUDGET // 2),
    f"SnapKV, {BUDGET} of the prompt": SnapKV(budget=BUDGET, window=16),
}


def texts(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Beginnings of long articles."""
    with gzip.open(DATA / "lm" / "wikitext2_test.txt.gz", "rt", encoding="utf-8") as file:
        found = [tokenizer.encode(plain(page)) for page in articles(file.read())]
    return [tokens[:length] for tokens in found if len(tokens) >= length][:count]


def measure(runner: TorchRunner, text: list[int], prompt: int, name: int) -> tuple[float, float]:
    """Negative log-likelihood of the text behind the prompt, and the seconds that it took."""
    table = list(range(-(-len(text) // runner.page)))
    own = (name, 0)
    logits = runner.run(Batch(text[:prompt], [prompt], [0], [table], [1], names=[own]))
    total, start = 0.0, time.perf_counter()
    for at in range(prompt, len(text)):
        total -= float(logits.log_softmax(-1)[0, text[at]])
        logits = runner.run(Batch([text[at]], [1], [at], [table], [1], names=[own]))
    return total, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load_model(pull("smollm2-135m-instruct").path, dtype=torch.float32)
    tokenizer = Tokenizer.from_gguf(loaded.metadata)
    rows = texts(tokenizer, args.texts, args.prompt + args.tokens)
    results = {}
    for kind, cache in KINDS.items():
        pages = -(-(args.prompt + args.tokens) // 16)
        runner = TorchRunner(loaded.model, pages=pages, cache=cache)
        loss = seconds = 0.0
        for name, text in enumerate(rows):
            found = measure(runner, text, args.prompt, name)
            loss, seconds = loss + found[0], seconds + found[1]
            size = runner.memory.bytes
            runner.end((name, 0))
        count = len(rows) * args.tokens
        results[kind] = {
            "perplexity": math.exp(loss / count),
            "megabytes": size / 1e6,
            "milliseconds_a_token": 1e3 * seconds / count,
        }
        print(f"{kind:26} " + "  ".join(f"{n} {v:.2f}" for n, v in results[kind].items()))
    if args.out is not None:
        conditions = {"texts": len(rows), "prompt": args.prompt, "tokens": args.tokens}
        args.out.write_text(json.dumps({**conditions, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
