"""Parallel requests through HTTP: treadle's server on its native kernels, and llama-server.

Both read the same GGUF file with all cores, and are asked by the same clients, all at once. The
peer's binary is built from llama.cpp's sources, as in the sdist of `llama-cpp-python`; its path is
in LLAMA_SERVER.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence

import race
from native_decode import model_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["Q8_0"], default="Q8_0")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as it:
        return int(it.getsockname()[1])


def figures(
    args: argparse.Namespace, command: Sequence[str], url: str, model: str
) -> Mapping[str, float]:
    """Start the server, wait for its health, ask."""
    from treadle.evals.load import Server
    from treadle.evals.speed import Workload, speed

    load = Workload(batch=args.clients, prompt=args.prompt, output=args.output, rounds=args.repeats)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"{url}/health", child)
        found = speed(Server(url, model, key=None, exact=True).measure(load, time.perf_counter))
    finally:
        child.terminate()
        child.wait()
    assert found.between_tokens is not None
    return {
        "tok/s": found.throughput,
        "first token s": found.first_token.p50,
        "between tokens s": found.between_tokens.p50,
        "p99 between s": found.between_tokens.p99,
    }


def wait_for(url: str, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if child.poll() is not None:
            raise SystemExit(f"the server ended with {child.returncode}")
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    port = str(free_port())
    command = [sys.executable, "-m", "treadle", "serve", f"model={model_file(args)}"]
    command += ["--device", "native", "--port", port, "--slots", str(args.clients)]
    return figures(args, command, f"http://127.0.0.1:{port}", "model")


def llama_server(args: argparse.Namespace) -> Mapping[str, float]:
    binary = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if not binary:
        raise SystemExit("no llama-server: set LLAMA_SERVER to its path")
    port, threads = str(free_port()), str(args.threads)
    context = args.clients * -(-2 * (args.prompt + args.output) // 256) * 256
    command = [binary, "-m", str(model_file(args)), "--port", port, "-np", str(args.clients)]
    command += ["-c", str(context), "-t", threads, "-tb", threads]
    return figures(args, command, f"http://127.0.0.1:{port}", "model")


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "llama-server": llama_server},
        name=lambda args: f"serve_{args.format}_clients{args.clients}",
        unit="generated tokens a second, prompts included; seconds",
        add_arguments=add_arguments,
    )
