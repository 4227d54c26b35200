"""Counters of energy: the processors' (RAPL) and the GPUs' (NVML), where the machine shows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Counter(ABC):
    """Joules that something has used since the counter was made."""

    @abstractmethod
    def joules(self) -> float: ...


class Package(Counter):
    """A processor with the memory that its counter includes.

    The counter starts again from zero now and then: it must be read more often than that
    (once in some minutes at full load).
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.last, self.total = int(self.file.read_text()), 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.total += (now - self.last) % self.range
        self.last = now
        return self.total / 1e6


class GPU(Counter):
    """A GPU, by the driver's own total in millijoules."""

    def __init__(self, library: Any, number: int) -> None:
        self.read = library.nvmlDeviceGetTotalEnergyConsumption
        self.handle = library.nvmlDeviceGetHandleByIndex(number)
        self.start = self.read(self.handle)

    def joules(self) -> float:
        return float(self.read(self.handle) - self.start) / 1e3


def packages(root: Path = POWERCAP) -> list[Counter]:
    """All processors; none where their counters cannot be read (often only root may)."""
    found: list[Counter] = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") == 1:  # parts of a package are counted in it
            with suppress(OSError, ValueError):
                found.append(Package(folder))
    return found


def cards() -> list[Counter]:
    """All GPUs whose driver counts; none without `nvidia-ml-py`."""
    if find_spec("pynvml") is None:
        return []
    library = import_module("pynvml")
    try:
        library.nvmlInit()
        count = library.nvmlDeviceGetCount()
    except library.NVMLError:
        return []
    found: list[Counter] = []
    for number in range(count):
        with suppress(library.NVMLError):
            found.append(GPU(library, number))
    return found
