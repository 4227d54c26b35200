"""The decision table, line by line, and what is said where nothing fits."""

from __future__ import annotations

import pytest

from treadle.core.errors import TreadleError
from treadle.core.progress import Progress
from treadle.models.gpt2 import gpt2
from treadle.planning import estimate as estimates
from treadle.planning.choose import MUCH, case_of, gib, recommend
from treadle.planning.estimate import Data, Machine, Row, estimate
from treadle.planning.methods import methods, student_of
from treadle.planning.rehearse import Job, Needs
from treadle.train.precision import BF16, FP32

GB = 10**9
SIZES = {
    "full": 10,
    "lora": 4,
    "dora": 5,
    "qlora": 2,
    "adapter": 4,
    "ia3": 3,
    "prefix": 3,
    "prompt": 3,
    "distillation": 6,
}


def machine(memory: float, disk: float = 1000) -> Machine:
    return Machine(
        memory_bytes=round(memory * GB),
        disk_bytes=round(disk * GB),
        fp32_gflops=100.0,
        bf16_gflops=100.0,
    )


def needs(**changes: int) -> Needs:
    parts = ("weights", "gradients", "optimizer", "activations", "temporaries", "loading", "heap")
    return Needs(
        **{"parameters": 1000, "trained": 10, "flops": 1, **dict.fromkeys(parts, 0), **changes}
    )


def rows(given: Machine) -> list[Row]:
    found = []
    for method in methods():
        size = SIZES[method.name] * GB
        fits = size <= given.memory_bytes and given.disk_bytes >= GB
        found.append(Row(method, needs(base=size), 1.0, 1, GB, fits))
    return found


def chosen(goal, records: int, tokens: int = 200, memory: float = 100) -> str:
    given, data = machine(memory), Data(records=records, tokens=tokens)
    return recommend(rows(given), goal, data, given).row.method.name


@pytest.mark.parametrize(
    ("goal", "records", "memory", "wanted"),
    [
        ("task", 1000, 100, "lora"),
        ("task", 1000, 3, "qlora"),
        ("task", 63, 100, "ia3"),
        ("task", 64, 100, "lora"),
        ("many", 1000, 100, "lora"),
        ("many", 10, 100, "lora"),
        ("knowledge", 1000, 100, "lora"),
        ("knowledge", MUCH // 200, 100, "full"),
        ("knowledge", MUCH // 200, 5, "lora"),
        ("knowledge", MUCH // 200, 2, "qlora"),
        ("smaller", 1000, 100, "distillation"),
    ],
)
def test_decision_table(goal, records: int, memory: float, wanted: str) -> None:
    assert chosen(goal, records, memory=memory) == wanted


def test_reasons_name_what_was_passed_over() -> None:
    given = machine(3)
    found = recommend(rows(given), "task", Data(records=1000, tokens=200), given)
    assert any("lora would need 3.73 GiB" in reason for reason in found.reasons)
    assert any("1.00% of 1,000 parameters" in reason for reason in found.reasons)


def test_nothing_fits() -> None:
    given = machine(1)
    with pytest.raises(TreadleError, match=r"nothing fits this machine: the least, qlora, needs"):
        recommend(rows(given), "task", Data(records=1000, tokens=200), given)
    given = machine(100, disk=0.5)
    with pytest.raises(TreadleError, match="distillation"):
        recommend(rows(given), "smaller", Data(records=1000, tokens=200), given)


def test_steps_and_micro_batches() -> None:
    data = Data(records=1000, tokens=200, per_step=16, at_once=2048, epochs=2.0)
    assert data.steps == 125
    assert data.micro_batches == 2  # 10 records fit at once
    assert data.batch().layout.lengths == (200,) * 10
    assert Data(records=3, tokens=4000, per_step=4).micro_batches == 4
    assert case_of("task", data) == "task"


def test_needs_of_a_run() -> None:
    """What lives at the highest moment; with libraries, holes and a twentieth for the kernels."""
    parts = {"weights": 1000, "gradients": 200, "optimizer": 30, "activations": 4, "temporaries": 6}
    found = needs(**parts, loading=900, heap=1500, base=70_000)
    assert (found.alive, found.resident) == (1240, 71_562)
    assert needs(**parts, loading=2000).alive == 2000


@pytest.mark.parametrize(
    ("at_once", "rehearsed", "work"), [(800, 2, 4), (2400, 2, 16 / 12), (3200, 1, 1)]
)
def test_rows_follow_from_what_was_rehearsed(
    monkeypatch: pytest.MonkeyPatch, at_once: int, rehearsed: int, work: float
) -> None:
    """50 steps of 16 records; of 4 micro-batches two are rehearsed, of one it alone. The second
    after one of 12 has but 4 records: a third of the work."""
    asked: list[Job] = []

    def rehearsal(jobs: list[Job], progress: Progress) -> list[Needs]:
        asked.extend(jobs)
        return [needs(trained=10, flops=rehearsed * 10**6, optimizer=80, heap=i) for i in (5, 6)]

    monkeypatch.setattr(estimates, "rehearse_all", rehearsal)
    by_name = {method.name: method for method in methods()}
    wanted = [by_name["lora"], by_name["distillation"]]
    data = Data(records=400, tokens=200, per_step=16, at_once=at_once, epochs=2.0)
    given = Machine(memory_bytes=9, disk_bytes=280, fp32_gflops=2.0, bf16_gflops=2.4)
    lora, distilled = estimate(gpt2(), data, given, wanted)
    seconds = 50 * work * 10**6 / 2.4e9
    assert (lora.seconds, lora.result_bytes, lora.disk_bytes) == (pytest.approx(seconds), 40, 280)
    assert [lora.method, distilled.method] == wanted
    assert [lora.fits, distilled.fits] == [True, False]  # 5 + 4 and 6 + 4 of memory
    less = given.replace(disk_bytes=279)
    assert not estimate(gpt2(), data, less, wanted)[0].fits
    tuned, taught = asked[:2]
    assert len(tuned.batches) == rehearsed
    assert (tuned.decoder, tuned.teacher) == (gpt2(), None)
    assert (taught.decoder, taught.teacher) == (student_of(gpt2()), gpt2())


def test_precision_is_the_faster_one_by_a_fifth() -> None:
    given = Machine(memory_bytes=1, disk_bytes=1, fp32_gflops=10.0, bf16_gflops=12.0)
    assert (given.precision, given.flops) == (BF16(), 12e9)
    given = given.replace(bf16_gflops=11.9)
    assert (given.precision, given.flops) == (FP32(), 10e9)


def test_student_keeps_first_and_last_of_a_third() -> None:
    teacher = gpt2()
    student = student_of(teacher)
    assert len(student.blocks) == 4
    assert student.blocks[0] == teacher.blocks[0]
    assert student.replace(blocks=()) == teacher.replace(blocks=())


def test_records_longer_than_the_context_are_refused() -> None:
    with pytest.raises(TreadleError, match="records of 2000 tokens do not fit"):
        estimate(gpt2(), Data(records=1, tokens=2000), machine(1), methods())


def test_sizes_are_readable() -> None:
    assert (gib(3 * 2**30), gib(20 * 2**20)) == ("3.00 GiB", "20.0 MiB")
    assert gib(2**30) == "1.00 GiB"
