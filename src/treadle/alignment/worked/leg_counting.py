"""leg_counting: legs of each animal, and a running total.

lobster: 15 * 10 = 150
duck: 10 * 2 = 20, 150 + 20 = 170
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines: list[str] = []
    total = 0
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        line = f"{animal}: {count} * {ANIMALS[animal]} = {legs}"
        lines.append(f"{line}, {total} + {legs} = {total + legs}" if lines else line)
        total += legs
    return lines
