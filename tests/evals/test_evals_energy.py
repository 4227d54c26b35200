"""Operations against torch's own counter, energy against counters that the test turns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_generation import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from treadle.core import joules
from treadle.core.errors import TreadleError
from treadle.core.meter import WATTS_PER_BUSY_CORE, Cost, Meter
from treadle.evals.energy import GRID, energy, grams, operations


@pytest.mark.parametrize("windows", [(None, None), (6, None), (4, 9)])
def test_operations_are_those_that_torch_counts(windows: tuple[int | None, ...]) -> None:
    """Each matrix and each token's attention, run under the counter."""
    model, prompt, output = tiny_model(*windows), 7, 5
    config = model.config
    heads, width = 4, config.dim // 4
    with FlopCounterMode(display=False) as counter:
        for _ in range(prompt + output - 1):
            for block in model.blocks:
                for module in block.modules():
                    if isinstance(module, torch.nn.Linear):
                        module(torch.zeros(1, module.in_features))
        for _ in range(output):
            model.head(torch.zeros(1, config.dim))
        for window in windows:
            for t in range(1, prompt + output):
                keys = torch.zeros(1, heads, min(t, window or t), width)
                query = torch.zeros(1, heads, 1, width)
                query @ keys.mT @ keys
    assert operations(config, prompt, output) == counter.get_total_flops()


def test_matrices_of_a_real_pass() -> None:
    """The model as it runs; the counter knows no fused attention and sees all tokens' logits."""
    model, length = tiny_model(), 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model(torch.zeros(1, length, dtype=torch.long)))
    unread = 2 * 257 * 16 * (length - 1)
    attention = sum(4 * 16 * 2 * t for t in range(1, length + 1))
    assert counter.get_total_flops() - unread == operations(model.config, length, 1) - attention


def test_energy_of_a_token() -> None:
    units = pytest.importorskip("codecarbon.core.units")
    bill = energy(Cost(2.0, 3.0, 10, 720.0, "measured"), tokens=90, grid=300.0)
    assert bill.joules_per_token == 8.0
    assert bill.source == "measured"
    kilowatt_hours = units.Energy.from_ujoules(8e6 * 1e6).kWh
    kilograms = units.EmissionsPerKWh.from_g_per_kWh(300.0).kgs_per_kWh * kilowatt_hours
    assert bill.grams_per_million == pytest.approx(kilograms * 1e3)
    assert grams(3.6e6, GRID) == GRID
    with pytest.raises(TreadleError, match="no tokens"):
        energy(Cost(2.0, 3.0, 10, 720.0, "measured"), tokens=0)


def package(root: Path, name: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_packages_are_summed_and_wrap(tmp_path: Path) -> None:
    first = package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # the cores, which the package counts too
    package(tmp_path, "intel-rapl:1", 0)
    package(tmp_path, "intel-rapl-mmio:0", 0)
    (package(tmp_path, "intel-rapl:2", 0) / "energy_uj").write_text("denied\n")
    counters = joules.packages(tmp_path)
    assert len(counters) == 2
    for value in (950_000, 200_000, 700_000):  # it starts again between the first two
        package(tmp_path, first.name, value)
        total = counters[0].joules()
    assert total == pytest.approx(0.8)
    assert counters[0].joules() == pytest.approx(0.8)
    assert joules.packages(tmp_path / "none") == []


def test_cards_are_asked_for_their_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = {0: 5_000, 1: 70_000}

    class NVMLError(Exception):
        pass

    def total(handle: int) -> int:
        if handle == 2:
            raise NVMLError("not supported")
        return totals[handle]

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )
    monkeypatch.setattr(joules, "find_spec", lambda name: library)
    monkeypatch.setattr(joules, "import_module", lambda name: library)
    counters = joules.cards()
    totals |= {0: 6_500, 1: 70_001}
    assert [c.joules() for c in counters] == pytest.approx([1.5, 0.001])

    def absent() -> None:
        raise NVMLError("no driver")

    library.nvmlInit = absent
    assert joules.cards() == []
    monkeypatch.setattr(joules, "find_spec", lambda name: None)
    assert joules.cards() == []


def test_the_meter_says_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(joules.Counter):
        def joules(self) -> float:
            return 42.0

    def cost(processors: list[Any], cards: list[Any]) -> Cost:
        monkeypatch.setattr("treadle.core.meter.packages", lambda: processors)
        monkeypatch.setattr("treadle.core.meter.cards", lambda: cards)
        with Meter() as meter:
            return meter.cost()

    measured = cost([Fixed(), Fixed()], [Fixed()])
    assert (measured.energy, measured.joules) == ("measured", 126.0)
    estimated = cost([], [Fixed()])
    assert estimated.energy == "estimated"
    assert estimated.joules == 42.0 + estimated.cpu_seconds * WATTS_PER_BUSY_CORE
