"""What a manifest says of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from treadle.core import machine as room
from treadle.core.machine import machine


def test_it_is_plain_data() -> None:
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert 1 <= found["cores"] <= (psutil.cpu_count() or 1)
    assert found["processor"]


def test_gpus_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 12\n")
    monkeypatch.setattr(room, "GPUS", tmp_path)
    assert machine()["gpus"] == ["NVIDIA H200"]


def test_a_processor_without_a_name_still_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CPUINFO", tmp_path / "absent")
    assert machine()["processor"]
