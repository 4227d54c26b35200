"""What a piece of work cost: time, processor time, peak memory, energy.

Energy is read from the processor's counter (RAPL) and the GPU's (NVML) where the machine lets us.
Elsewhere it is *estimated* from processor time, and every report says which of the two it is.
"""

from __future__ import annotations

import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from treadle.core.joules import cards, packages

WATTS_PER_BUSY_CORE = 7.5
"""Used for estimates only: a server core's share of a 2-4 W/core package at load plus memory."""

Source = Literal["measured", "estimated"]
"""Of energy: the machine's counters, or processor time."""

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What was spent."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Highest resident memory of the process and its children while the work ran."""
    joules: float
    """Of the whole machine where they are measured, of this process where they are estimated."""
    energy: Source

    def plus(self, earlier: dict[str, Any] | None) -> Cost:
        """Together with what an interrupted attempt at the same work had spent."""
        if not earlier:
            return self
        return Cost(
            seconds=self.seconds + earlier["seconds"],
            cpu_seconds=self.cpu_seconds + earlier["cpu_seconds"],
            peak_bytes=max(self.peak_bytes, earlier["peak_bytes"]),
            joules=self.joules + earlier["joules"],
            energy=self.energy,
        )

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """A context manager that samples memory in the background; `cost()` may be asked any time."""

    def __init__(self, interval: float = 0.2) -> None:
        self.interval = interval
        self.process = psutil.Process()
        self.peak = 0
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.exact = forget_highest()
        self.start, self.cpu = time.monotonic(), self._cpu()
        self.packages, self.cards = packages(), cards()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()

    def cost(self) -> Cost:
        """What was spent since the meter was entered."""
        seconds, cpu = time.monotonic() - self.start, self._cpu() - self.cpu
        measured, joules = bool(self.packages), self._joules()
        if not measured:
            joules += cpu * WATTS_PER_BUSY_CORE
        return Cost(seconds, cpu, self.peak, joules, "measured" if measured else "estimated")

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()
            self._joules()  # often enough that no counter starts again unseen

    def _joules(self) -> float:
        with self._lock:
            return sum(counter.joules() for counter in (*self.packages, *self.cards))

    def _sample(self) -> None:
        total = highest_resident() if self.exact else self.process.memory_info().rss
        for child in self.process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.peak = max(self.peak, total)

    def _cpu(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)


def forget_highest() -> bool:
    """Begin `highest_resident` anew from what is held now; whether this system can (Linux)."""
    try:
        REFERENCES.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def highest_resident() -> int:
    """Most bytes of memory that this process has had at a time."""
    try:
        # Not `ru_maxrss`, which on Linux begins with that of the process that started this one.
        status = STATUS.read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
