"""Code: a completion's program must pass the problem's tests, in the sandbox.

Tests are Python that raises where something is wrong: `metadata["tests"]`, a text or a list of
lines, else the problem's answer. MBPP's rows have them as `test_list`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from treadle.alignment.sandbox import run_python
from treadle.core.errors import TreadleError
from treadle.data.records import Problem

_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
RUNNER = """\
import sys
program, tests = {program!r}, {tests!r}
space = {{"__name__": "solution"}}
exec(compile(program, "solution.py", "exec"), space)
exec(compile(tests, "tests.py", "exec"), space)
print("\\n" + sys.stdin.readline())
"""


def marks(problem: Problem, completion: str) -> float:
    """1 where all tests pass within the limits, else 0.

    Raises:
        TreadleError: the problem has no tests.
    """
    program = extract_code(completion)
    tests = tests_of(problem)
    if not program:
        return 0.0
    # A program that leaves early with status 0 has passed nothing: the word is said after the
    # tests, and only its last reader knows it.
    word = secrets.token_hex(16)
    outcome = run_python(RUNNER.format(program=program, tests=tests), stdin=f"{word}\n")
    said = outcome.stdout.strip().splitlines()
    return float(outcome.code == 0 and bool(said) and said[-1] == word)


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
