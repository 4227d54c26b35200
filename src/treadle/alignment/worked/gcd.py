"""gcd of two numbers: Euclid's divisions with remainder.

87 = 1 * 57 + 30
57 = 1 * 30 + 27
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    b, a = sorted(metadata["numbers"])
    lines: list[str] = []
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return lines
