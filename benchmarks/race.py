"""Side-by-side races: each contestant runs in a process of its own, in turn, several rounds.

A benchmark is a script with one function a contestant. Called without `--contestant` it runs all
of them alternately and prints medians, ratios to the first peer and peak memory; with it, it runs
that one and prints a JSON line. Alternation and medians keep a comparison honest on a machine
whose speed drifts; nothing here is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Contestant = Callable[[argparse.Namespace], Mapping[str, float]]


class Clock:
    """Seconds of each pass through `lap`, the first `warmup` of them left out."""

    def __init__(self, warmup: int = 1) -> None:
        self.warmup, self.laps = warmup, []

    @contextmanager
    def lap(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.laps.append(time.perf_counter() - start)

    @property
    def seconds(self) -> float:
        return statistics.median(self.laps[self.warmup :])


def peak_gib() -> float:
    """Highest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    contestants: Mapping[str, Contestant],
    *,
    name: Callable[[argparse.Namespace], str],
    unit: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run one contestant, or all of them in turn."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--contestant", choices=list(contestants))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(contestants))
    add_arguments(parser)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.contestant:
        import torch

        torch.set_num_threads(args.threads)
        figures = contestants[args.contestant](args)
        print("RESULT " + json.dumps({**figures, "peak GiB": peak_gib()}))
        return
    found: dict[str, list[dict[str, float]]] = {c: [] for c in args.only}
    for round_ in range(args.rounds):
        for contestant in args.only:
            found[contestant].append(_run(contestant))
            print(f"round {round_ + 1} {contestant}: {found[contestant][-1]}", file=sys.stderr)
    _report(name(args), found, unit, args)


def _run(contestant: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--contestant", contestant]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "MKL_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | threads
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"{contestant} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _report(
    name: str, found: Mapping[str, list[dict[str, float]]], unit: str, args: argparse.Namespace
) -> None:
    table = {
        contestant: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for contestant, rounds in found.items()
    }
    ours = table.get("treadle")
    for contestant, figures in table.items():
        line = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{contestant:>24}: {line}")
        if ours and contestant != "treadle":
            ratios = ", ".join(
                f"{key} {ours[key] / value:.2f}x" for key, value in figures.items() if key in ours
            )
            print(f"{'treadle / ' + contestant:>24}: {ratios}")
    settings = {k: v for k, v in vars(args).items() if k not in ("contestant", "only")}
    record: dict[str, Any] = {
        "benchmark": name,
        "unit": unit,
        "settings": settings,
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": _versions(),
        "rounds": found,
        "median": table,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "transformers", "trl", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
