"""prime_factorization: split off the smallest prime until a prime is left.

84 = 2 × 42
42 = 2 × 21
21 = 3 × 7
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    rest, lines = metadata["number"], []
    for prime in metadata["factors"][:-1]:
        lines.append(f"{rest} = {prime} × {rest // prime}")
        rest //= prime
    return lines
