"""One base, many adapters: memory, the time of a switch, and the price of a mixed batch.

    python benchmarks/adapters.py [--rank 16] [--tokens 24]

Adapters are LoRA on all linear layers of SmolLM2-135M in float32, with weights drawn at random:
what they say does not matter here. Times are medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from common import model_folder

from treadle.inference.adapters import Adapters
from treadle.inference.attach import attach
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.hub.load import load_model
from treadle.peft.adapter import adapted, remove
from treadle.peft.files import save_adapter
from treadle.peft.lora import LoRA
from treadle.tokenizers.tokenizer import Tokenizer

SEQUENCES, PROMPT = 8, 32


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def resident() -> int:
    return psutil.Process().memory_info().rss


def write_adapters(folder: Path, rank: int) -> list[Path]:
    model = load_model(model_folder()).model
    paths = []
    for index in range(SEQUENCES):
        LoRA(rank=rank)(model)
        with torch.no_grad():
            for layer in adapted(model).values():
                layer.B.normal_(std=0.01)
        paths.append(folder / f"a{index}")
        save_adapter(model, paths[-1])
        remove(model)
    return paths


def milliseconds(call: object, times: int = 20) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)


def decode(engine: Engine, names: list[str | None], tokens: int) -> float:
    """Tokens a second, once all prompts are read."""
    sampling = Sampling(temperature=0.0, max_tokens=tokens, min_tokens=tokens)
    for name in names:
        prompt = torch.randint(10, 40_000, (PROMPT,)).tolist()
        engine.submit(Request(tuple(prompt), sampling, adapter=name))
    engine.step()
    engine.step()  # gathers the rows
    start, count = time.perf_counter(), 0
    while engine.running:
        count += len(engine.step())
    return count / (time.perf_counter() - start)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--tokens", type=int, default=24)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_adapters(Path(temporary), given.rank)
        empty = resident()
        model = load_model(model_folder(), dtype=torch.float32).model.requires_grad_(False)
        engine = Engine(model, Tokenizer.load(model_folder()), EngineConfig(adapters=SEQUENCES))
        decode(engine, [None], 4)  # takes the memory that any pass needs
        print(
            f"base                     {megabytes(sum(p.nbytes for p in model.parameters()))}, "
            f"process {megabytes(resident() - empty)}"
        )
        before = resident()
        for count, path in enumerate(paths, 1):
            start = time.perf_counter()
            attach(engine, path.name, path)
            taken = 1e3 * (time.perf_counter() - start)
            shelf = engine.runner.adapters
            assert isinstance(shelf, Adapters)
            print(
                f"{count} adapters               {megabytes(shelf.nbytes)}, process "
                f"+{megabytes(resident() - before)}, the last loaded in {taken:.0f} ms"
            )
        names: list[str | None] = [path.name for path in paths]
        turns = iter(names * 100)

        def switch() -> None:
            name = next(turns)
            shelf.bring({name})
            with shelf.routed([(name, 1)]):
                pass

        print(f"switch, in memory        {milliseconds(switch):.3f} ms")
        batches = {
            "8 x base": [None] * SEQUENCES,
            "8 x one adapter": names[:1] * SEQUENCES,
            "8 x 8 adapters": names,
            "4 adapters, 4 x base": [*names[:4], *[None] * 4],
            "1 x base": [None],
            "1 x one adapter": names[:1],
        }
        rates: dict[str, list[float]] = {label: [] for label in batches}
        for _ in range(3):
            for label, batch in batches.items():
                rates[label].append(decode(engine, batch, given.tokens))
        for label, found in rates.items():
            base = "1 x base" if label.startswith("1") else "8 x base"
            ratio = median(found) / median(rates[base])
            print(f"{label:24s} {median(found):.1f} tokens/s, {ratio:.2f} of the base's")
        small = Adapters(load_model(model_folder()).model.requires_grad_(False), 1)
        for path in paths[:2]:
            small.load(path.name, path)
        away = iter([path.name for path in paths[:2]] * 100)
        print(
            f"switch, from the disk    {milliseconds(lambda: small.bring({next(away)}), 6):.0f} ms"
        )


if __name__ == "__main__":
    main()
