"""Mathematics: equal as expressions, whatever the notation (math-verify)."""

from __future__ import annotations

from treadle.core.errors import TreadleError
from treadle.data.records import Problem


def marks(problem: Problem, completion: str) -> float:
    """1 where the answer in the completion (boxed, in LaTeX, or the last expression) equals the
    problem's.

    Raises:
        TreadleError: the library is absent.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise TreadleError(
            "the verifier `math` needs math-verify: pip install 'treadle[tasks]'"
        ) from None
    # Its own time limit uses the signal that ours does: ours holds.
    gold = parse(f"${problem.answer}$", parsing_timeout=None)
    given = parse(completion, parsing_timeout=None)
    return float(verify(gold, given, timeout_seconds=None))
