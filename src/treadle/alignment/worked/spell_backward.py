"""spell_backward: the letters one by one, then from the last to the first.

t o u c a n
n a c u o t
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps(metadata: Mapping[str, Any]) -> list[str]:
    word = metadata["word"]
    return [" ".join(word), " ".join(reversed(word))]
