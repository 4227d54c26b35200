"""chain_sum: one operation a line, from left to right.

57 + 87 = 144
144 - 70 = 74
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    first, *rest = metadata["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return lines
