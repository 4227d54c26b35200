"""The machine that a step ran on, for its manifest."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

CPUINFO = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, bytes of memory, GPUs, operating system."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _processor() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (v for k, _, v in (line.partition(":") for line in lines) if k.strip() == "model name")
    return next(names, platform.processor() or platform.machine()).strip()


def _gpus() -> list[str]:
    """Models of NVIDIA cards, from the driver, without loading torch."""
    found = []
    for path in sorted(GPUS.glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                found.append(value.strip())
    return found
