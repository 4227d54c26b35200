"""Decoding and prefill of SmolLM2-135M on the processor: treadle's native runner and llama.cpp.

Both read the same GGUF file, through their low-level interfaces, with all cores.

`--level avx2` is treadle as on a processor without AVX-512. For a peer of that kind, build
llama.cpp with `cmake -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
-DBUILD_SHARED_LIBS=ON` and name the folder of its libraries in LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import race

FORMATS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="Q4_1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=64, help="tokens before decoding starts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--level", help="the instructions that treadle takes; its best without")


def model_file(args: argparse.Namespace) -> Path:
    """SmolLM2 in the wanted format, written once; Q4_K_M by llama.cpp's own mixture of formats."""
    from treadle.models.hub.load import load_model
    from treadle.models.hub.pull import pull
    from treadle.models.hub.save import save_gguf

    original = pull("smollm2-135m-instruct").path
    if args.format in original.name:
        return original
    file = original.with_name(f"benchmark.{args.format}.gguf")
    if not file.exists():
        loaded = load_model(original)
        plain = "F16" if args.format == "Q4_K_M" else args.format
        target = file.with_name(f"benchmark.{plain}.gguf")
        save_gguf(loaded.model, target, format=plain, metadata=loaded.metadata)
        if target != file:
            mix(target, file)
            target.unlink()
    return file


def mix(source: Path, target: Path) -> None:
    import llama_cpp as lib

    settings = lib.llama_model_quantize_default_params()
    settings.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M
    done = lib.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    assert done == 0, done


def prompt(length: int, row: int = 0) -> list[int]:
    return [(7 * i + 13 * row) % 40_000 + 500 for i in range(length)]


def figures(
    args: argparse.Namespace, read: Callable[[int], None], step: Callable[[int], None]
) -> Mapping[str, float]:
    """`read(n)` reads a prompt of n tokens from an empty cache into every sequence's own place;
    `step(position)` appends one token to each sequence."""
    prefill = race.Clock()
    for _ in range(4):
        with prefill.lap():
            read(args.prompt)
    speeds = []
    for _ in range(3):
        read(args.context)
        step(args.context)
        start = time.perf_counter()
        for i in range(1, args.tokens):
            step(args.context + i)
        speeds.append(args.batch * (args.tokens - 1) / (time.perf_counter() - start))
    return {"decode tok/s": max(speeds), "prefill tok/s": args.prompt / prefill.seconds}


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    import torch

    from treadle.inference.native_runner import NativeRunner
    from treadle.inference.runner import Batch

    torch.set_num_threads(1)  # its threads would spin beside the runner's
    each = -(-max(args.prompt, args.context + args.tokens) // 32)
    runner = NativeRunner.open(model_file(args), pages=args.batch * each, level=args.level)
    tables = [list(range(i * each, (i + 1) * each)) for i in range(args.batch)]

    def read(length: int) -> None:
        for i in range(args.batch if length == args.context else 1):
            runner.run(Batch(prompt(length, i), [length], [0], [tables[i]], [1]))

    ones, last = [1] * args.batch, [500] * args.batch

    def step(position: int) -> None:
        nonlocal last
        starts = [position] * args.batch
        logits = runner.run(Batch(last, ones, starts, tables, ones))
        last = runner.peaks(logits)[0].tolist()

    return figures(args, read, step)


def llama_cpp(args: argparse.Namespace) -> Mapping[str, float]:
    import llama_cpp as lib
    import numpy as np

    path = model_file(args)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    per_sequence = max(args.prompt, args.context + args.tokens)
    settings.n_ctx = args.batch * -(-per_sequence // 256) * 256
    settings.n_batch = settings.n_ubatch = 512
    settings.n_seq_max = args.batch
    settings.n_threads = settings.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, settings)
    memory = lib.llama_get_memory(context)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence, and whether logits are wanted."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert lib.llama_decode(context, batch) == 0

    def read(length: int) -> None:
        lib.llama_memory_clear(memory, False)
        for i in range(args.batch if length == args.context else 1):
            decode([(t, j, i, j == length - 1) for j, t in enumerate(prompt(length, i))])
        lib.llama_synchronize(context)

    last = [500] * args.batch

    def step(position: int) -> None:
        nonlocal last
        decode([(token, position, i, True) for i, token in enumerate(last)])
        logits = lib.llama_get_logits(context)
        rows = np.ctypeslib.as_array(logits, shape=(args.batch, vocab))
        last = rows.argmax(-1).tolist()

    return figures(args, read, step)


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "llama.cpp": llama_cpp},
        name=lambda args: "_".join(
            ("native_decode", args.format, f"batch{args.batch}", *filter(None, (args.level,)))
        ),
        unit="tokens a second",
        add_arguments=add_arguments,
    )
