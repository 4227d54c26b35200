"""Which technique for this budget, this data and this goal, and why.

    many tasks on one base       adapters: megabytes each, switched per request
    a smaller or faster model    distillation: no other method makes the model smaller
    new knowledge, much data     full fine-tuning: LoRA learns less there (Biderman et al. 2024)
    one task                     LoRA; on a 4-bit base where memory is short
    a handful of examples        the fewest trained numbers: IA3, soft prompts (Liu et al. 2022)

What does not fit into memory or on the disk is never recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.planning.estimate import Data, Machine, Row

CARD = Card(
    id="plan.choose",
    paper="Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv:2405.09673; "
    "Dettmers et al. 2023, arXiv:2305.14314; Liu et al. 2022, arXiv:2205.05638",
    summary="Recommends a technique for a goal, an amount of data and a machine, with reasons.",
    recipe="treadle plan smollm2-135m-instruct --records 1000 --goal smaller",
    oracle="tests/planning/test_planning_choose.py::test_decision_table",
)
Goal = Literal["task", "knowledge", "many", "smaller"]
GOALS: Mapping[Goal, str] = {
    "task": "one task, learned as well as the data allow",
    "knowledge": "new facts or a new language, from much text",
    "many": "many tasks on one base, switched per request",
    "smaller": "a smaller, faster model that does the same",
}
HANDFUL = 64
"""Records below which the fewest trained numbers are safest from learning by heart."""
MUCH = 5_000_000
"""Tokens from which full fine-tuning takes in more than adapters of usual ranks hold."""
ORDERS: Mapping[str, tuple[str, ...]] = {
    "handful": ("ia3", "prompt", "lora", "qlora"),
    "task": ("lora", "qlora", "adapter", "ia3", "prefix"),
    "much": ("full", "lora", "qlora"),
    "many": ("lora", "qlora", "ia3", "adapter", "prefix"),
    "smaller": ("distillation",),
}
WHY: Mapping[str, str] = {
    "handful": "with a handful of records, few trained numbers forget least and overfit least",
    "task": "adapters of low rank learn one task as well as full fine-tuning, at a part of the "
    "memory, and forget less",
    "much": "with so much to take in, all weights should move: adapters learn less from it",
    "many": "each task is a small file beside one base, switched per request",
    "smaller": "only distillation makes the model smaller; the others add to it",
}


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why."""

    row: Row
    reasons: tuple[str, ...]


def recommend(rows: Sequence[Row], goal: Goal, data: Data, machine: Machine) -> Recommendation:
    """The first method of the goal's order that fits.

    Raises:
        TreadleError: none fits; names what the least of them needs.
    """
    case = case_of(goal, data)
    by_name = {row.method.name: row for row in rows}
    wanted = [by_name[name] for name in ORDERS[case] if name in by_name]
    for place, row in enumerate(wanted):
        if row.fits:
            return Recommendation(row, _reasons(case, wanted[:place], row, machine))
    least = min(wanted, key=lambda row: row.needs.resident)
    raise TreadleError(
        f"nothing fits {machine.name}: the least, {least.method.name}, needs "
        f"{gib(least.needs.resident)} of memory (there are {gib(machine.memory_bytes)}) and "
        f"{gib(least.disk_bytes)} of disk (there are {gib(machine.disk_bytes)}): take a smaller "
        "model, shorter records (--tokens), or fewer tokens at once (--at-once)"
    )


def case_of(goal: Goal, data: Data) -> str:
    """The line of the table."""
    total = data.records * data.tokens
    if goal in ("many", "smaller"):
        return goal
    if goal == "knowledge":
        return "much" if total >= MUCH else "task"
    return "handful" if data.records < HANDFUL else "task"


def _reasons(case: str, passed_over: Sequence[Row], row: Row, machine: Machine) -> tuple[str, ...]:
    short = tuple(
        f"{other.method.name} would need {gib(other.needs.resident)} of memory and "
        f"{gib(other.disk_bytes)} of disk; {machine.name} has {gib(machine.memory_bytes)} and "
        f"{gib(machine.disk_bytes)}"
        for other in passed_over
    )
    share = row.needs.trained / row.needs.parameters
    return (WHY[case], *short, f"it trains {share:.2%} of {row.needs.parameters:,} parameters")


def gib(size: float) -> str:
    """`3.2 GiB`, `20 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
