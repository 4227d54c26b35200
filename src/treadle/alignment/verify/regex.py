"""A pattern: the whole answer, or the whole completion where it marks no answer, must match."""

from __future__ import annotations

import re
from functools import lru_cache

from treadle.core.errors import TreadleError
from treadle.data.records import Problem


def marks(problem: Problem, completion: str) -> float:
    """1 where the completion, stripped, is a full match of the problem's answer as a pattern.

    Raises:
        TreadleError: the answer is no regular expression.
    """
    return float(_compiled(problem.answer).fullmatch(completion.strip()) is not None)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise TreadleError(f"`{pattern}` is no regular expression: {error}") from None
