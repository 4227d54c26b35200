"""Perplexity of SmolLM2-135M in few bits: treadle's native runner beside llama.cpp's own tool.

Both read the same GGUF file and the same text, WikiText-2's test part, as `llama-perplexity` does:
windows of `--context` tokens one after another, of which the second half is scored. The difference
is given with its standard error over windows, for both saw the same ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

import native_decode
import torch
import torch.nn.functional as F
from common import DATA

from treadle.inference.native_runner import NativeRunner
from treadle.inference.runner import Batch
from treadle.models.hub.gguf import GGUFFile
from treadle.tokenizers.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "native_perplexity.json"


def ours(file: Path, text: str, context: int, chunks: int) -> list[float]:
    """Mean negative log-likelihood of the scored tokens of each window."""
    tokens = Tokenizer.from_gguf(GGUFFile.open(file).metadata).encode(text, add_special=False)
    runner = NativeRunner.open(file, pages=-(-context // 32))
    table, half, found = list(range(runner.pages)), context // 2, []
    for at in range(0, chunks * context, context):
        window = tokens[at : at + context]
        logits = runner.run(Batch(window, [context], [0], [table], [context - half]))
        scored = torch.tensor(window[half + 1 :])
        found.append(float(F.cross_entropy(logits[:-1], scored)))
    return found


def theirs(program: str, file: Path, text: str, args: argparse.Namespace) -> list[float]:
    """The same, from the running means that the tool prints: [1]12.34,[2]..."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as raw:
        raw.write(text)
        raw.flush()
        command = [program, "-m", file, "-f", raw.name, "-c", args.context, "-b", args.context]
        command += ["--chunks", args.chunks, "-t", args.threads]
        done = subprocess.run(
            list(map(str, command)), check=True, capture_output=True, text=True, errors="replace"
        )
    pairs = re.findall(r"\[(\d+)\](\d+\.\d+)", done.stdout + done.stderr)
    means = [math.log(float(value)) for _, value in pairs]
    assert len(means) == args.chunks, done.stderr[-2000:]
    sums = [0.0, *(mean * n for n, mean in enumerate(means, 1))]
    return [after - before for before, after in pairwise(sums)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q4_K_M", "Q8_0"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-perplexity", default="llama-perplexity", dest="program")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with gzip.open(DATA / "lm" / "wikitext2_test.txt.gz", "rt", encoding="utf-8") as lines:
        text = lines.read(8 * args.context * args.chunks)
    table = {}
    for format in args.formats:
        args.format = format
        file = native_decode.model_file(args)
        pair = ours(file, text, args.context, args.chunks), theirs(args.program, file, text, args)
        gaps = [a - b for a, b in zip(*pair, strict=True)]
        table[format] = {
            "treadle": math.exp(statistics.mean(pair[0])),
            "llama.cpp": math.exp(statistics.mean(pair[1])),
            "ratio": math.exp(statistics.mean(gaps)),
            "ratio's standard error": statistics.stdev(gaps) / math.sqrt(len(gaps)),
        }
        print(format, table[format], flush=True)
    settings = {"context": args.context, "windows": args.chunks, "text": "WikiText-2, test"}
    record = {"benchmark": "native_perplexity", "settings": settings, "perplexity": table}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
