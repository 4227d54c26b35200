"""Fixtures shared by all rooms: offline libraries, real data where it is, deterministic threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports Triton: kernels for GPUs are run by its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

COLLECTED = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = {item.nodeid for item in items}


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> set[str]:
    """Ids of all tests that this run found, those it will not run included."""
    return request.config.stash[COLLECTED]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets; tests that need them skip where they are absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TREADLE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("real data absent; set TREADLE_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; tests that need it skip where it was never fetched."""
    cache = Path(os.environ.get("TREADLE_CACHE") or "~/.cache/treadle").expanduser()
    folder = cache / "models" / "all-minilm-l6-v2"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("`treadle pull all-minilm-l6-v2` fetches the model of this test")
    return folder
