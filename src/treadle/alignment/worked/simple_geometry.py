"""simple_geometry: the sum of a polygon's angles, less each known one.

4 sides: (4 - 2) * 180 = 360
360 - 33 = 327
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    sides = metadata["n_sides"]
    rest = (sides - 2) * 180
    lines = [f"{sides} sides: ({sides} - 2) * 180 = {rest}"]
    for angle in map(int, metadata["known_angles"]):
        lines.append(f"{rest} - {angle} = {rest - angle}")
        rest -= angle
    return lines
