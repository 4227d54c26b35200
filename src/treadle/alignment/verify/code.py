"""Code: a completion's program must pass the problem's tests, in the sandbox.

Tests are Python that raises where something is wrong: `metadata["tests"]`, a text or a list of
lines, else the problem's answer. MBPP's rows have them as `test_list`. They run apart from the
program (see `code_trial`), and do not see what it prints; helpers that they need, they import or
define themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from treadle.alignment import code_trial
from treadle.alignment.sandbox import run_beside
from treadle.core.errors import TreadleError
from treadle.data.records import Problem

_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def marks(problem: Problem, completion: str) -> float:
    """1 where all tests pass within the limits, else 0.

    Raises:
        TreadleError: the problem has no tests.
    """
    program = extract_code(completion)
    tests = tests_of(problem)
    if not program:
        return 0.0
    judge, judged = (
        f"{Path(code_trial.__file__).read_text('utf-8')}\n{call}"
        for call in (f"run_tests({tests!r})", f"run_program({program!r})")
    )
    return float(run_beside(judge, judged).code == 0)


def extract_code(completion: str) -> str:
    """The last fenced block, or all of the text where nothing is fenced."""
    blocks = _FENCED.findall(completion)
    return (blocks[-1] if blocks else completion).strip()


def tests_of(problem: Problem) -> str:
    found = problem.metadata.get("tests") or problem.metadata.get("test_list") or problem.answer
    text = found if isinstance(found, str) else "\n".join(map(str, _lines(found)))
    if not text.strip():
        raise TreadleError("a problem for the verifier `code` has no tests: put them in `tests`")
    return text


def _lines(found: object) -> Sequence[object]:
    if not isinstance(found, list | tuple):
        raise TreadleError(f"`tests` is a {type(found).__name__}: give a text, or a list of lines")
    return found
