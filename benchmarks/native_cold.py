"""From nothing to the first token: a new process opens SmolLM2-135M and reads a short prompt.

Memory is what the process holds after that, without and with the pages of the file that lie in the
system's cache; `imports` is the time until the libraries are there, and part of the whole.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import native_decode
import race

START = time.perf_counter()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=native_decode.FORMATS, default="Q4_1")
    parser.add_argument("--prompt", type=int, default=16)


def figures(imported: float, opened: float) -> Mapping[str, float]:
    done = time.perf_counter()
    own, files = (_status(key) for key in ("RssAnon", "RssFile"))
    return {
        "imports s": imported - START,
        "open s": opened - imported,
        "prompt s": done - opened,
        "first token s": done - START,
        "own GiB": own,
        "own and files GiB": own + files,
    }


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key + ":")) / 2**20


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    from treadle.inference.native_runner import NativeRunner
    from treadle.inference.runner import Batch

    file = native_decode.model_file(args)
    imported = time.perf_counter()
    runner = NativeRunner.open(file)
    opened = time.perf_counter()
    pages = list(range(-(-args.prompt // runner.page)))
    tokens = native_decode.prompt(args.prompt)
    runner.run(Batch(tokens, [args.prompt], [0], [pages], [1])).argmax(-1).tolist()
    return figures(imported, opened)


def llama_cpp(args: argparse.Namespace) -> Mapping[str, float]:
    import llama_cpp

    file = native_decode.model_file(args)
    imported = time.perf_counter()
    model = llama_cpp.Llama(
        str(file), n_ctx=0, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    opened = time.perf_counter()
    model.eval(native_decode.prompt(args.prompt))
    model.sample(temp=0.0)
    return figures(imported, opened)


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "llama.cpp": llama_cpp},
        name=lambda args: f"native_cold_{args.format}",
        unit="seconds and GiB",
        add_arguments=add_arguments,
    )
