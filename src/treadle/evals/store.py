"""Records on disk: a JSON line for each answered item, so that a second run answers nothing twice.

A record's key is a hash of the model, the task and the item. A run that is killed loses the item
under way; a line that was cut off is left out and computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from treadle.core.config import digest, dump
from treadle.core.files import write_text
from treadle.evals.task import Benchmark, Item, Record, Subject


def fingerprint(subject: Subject) -> str:
    """Equal for models that answer alike: shape, weights, precision, tokenizer (16 hex digits)."""
    model = subject.model
    hasher = hashlib.sha256(json.dumps(dump(model.config), sort_keys=True).encode())
    hasher.update(subject.tokenizer.digest.encode())
    hasher.update(repr(model.head).encode())  # how a head pools, and its labels
    device = model.embedding.weight.device.type
    with subject.autocast():
        mixed = torch.is_autocast_enabled(device)
        hasher.update(str(torch.get_autocast_dtype(device) if mixed else "").encode())
    for name, tensor in model.state_dict().items():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        hasher.update(memoryview(raw.numpy()))
    return hasher.hexdigest()[:16]


def item_key(model: str, task: Benchmark, item: Item) -> str:
    """Independent of the task's limit, so that a longer run goes on from a shorter one."""
    parts = (model, digest(task.replace(limit=None)), asdict(item))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """The records of one task, in memory and, where a path is given, in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.file: TextIO | None = None
        if path is not None and path.is_file():
            self._read(path)

    def add(self, key: str, item: Item, record: Record) -> None:
        self.records[key] = record
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        line = {"key": key, **asdict(item), "output": record.output, "metrics": record.metrics}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _read(self, path: Path) -> None:
        sound: list[str] = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            entry = _parsed(line)
            if entry is not None:
                sound.append(line)
                self.records[entry["key"]] = Record(entry["output"], entry["metrics"])
        if len(sound) < len(lines):
            write_text(path, "".join(f"{line}\n" for line in sound))


def _parsed(line: str) -> Mapping[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(entry, dict) and {"key", "output", "metrics"} <= entry.keys()
    return entry if whole else None
