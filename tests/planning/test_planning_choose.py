"""The decision table, line by line, and what is said where nothing fits."""

from __future__ import annotations

import pytest

from treadle.core.errors import TreadleError
from treadle.planning.choose import MUCH, case_of, gib, recommend
from treadle.planning.estimate import Data, Machine, Row, estimate
from treadle.planning.methods import methods, student_of
from treadle.planning.rehearse import Needs

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


def rows(given: Machine) -> list[Row]:
    found = []
    for method in methods():
        size = SIZES[method.name] * GB
        needs = Needs(
            parameters=1000,
            trained=10,
            weights=0,
            gradients=0,
            optimizer=0,
            activations=0,
            temporaries=0,
            loading=0,
            flops=1,
            heap=0,
            base=size,
        )
        fits = size <= given.memory_bytes and given.disk_bytes >= GB
        found.append(Row(method, needs, 1.0, 1, GB, fits))
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


def test_student_keeps_first_and_last_of_a_third() -> None:
    from treadle.models.gpt2 import gpt2

    teacher = gpt2()
    student = student_of(teacher)
    assert len(student.blocks) == 4
    assert student.blocks[0] == teacher.blocks[0]
    assert student.replace(blocks=()) == teacher.replace(blocks=())


def test_records_longer_than_the_context_are_refused() -> None:
    from treadle.models.gpt2 import gpt2

    with pytest.raises(TreadleError, match="records of 2000 tokens do not fit"):
        estimate(gpt2(), Data(records=1, tokens=2000), machine(1), methods())


def test_sizes_are_readable() -> None:
    assert (gib(3 * 2**30), gib(20 * 2**20)) == ("3.00 GiB", "20.0 MiB")
