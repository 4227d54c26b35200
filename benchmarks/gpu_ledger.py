"""What the checks of a GPU share: what was found, how long work takes, the model they run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import model_folder
from torch import Tensor

from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.llama import tiny_llama
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer


@dataclass
class Ledger:
    """What was found."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, error: float, limit: float) -> None:
        good = error <= limit
        self.checks.append({"check": name, "error": error, "limit": limit, "passed": good})
        print(f"{'ok    ' if good else 'FAILED'} {name}: {error:.3g} (limit {limit:.3g})")

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """A path that falls is a failed check, and no reason to skip the others."""
        try:
            work()
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.checks.append({"check": name, "fell": said, "passed": False})
            print(f"FAILED {name}: {said}")

    def time(self, name: str, **figures: float) -> None:
        self.times.append({"path": name, **figures})
        print(f"       {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of `work`, the device waited for."""
    laps = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[2:])


def far(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).abs().max() / exact.abs().max())


def opened(args: argparse.Namespace) -> tuple[DecoderModel, Tokenizer]:
    if args.model == "tiny":
        torch.manual_seed(0)
        config = tiny_llama(512, dim=64, layers=2, kv_heads=2, context=256)
        return config.build().eval(), byte_tokenizer()
    folder = model_folder()
    return load_model(folder, dtype=torch.float32).model.eval(), Tokenizer.load(folder)


def byte_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.BPE({chr(33 + i): i for i in range(512)}, []))
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special=SpecialTokens(eos="<end>"))
