"""Verifiers of code, JSON, patterns, tool calls and mathematics; the sandbox they need."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from treadle.alignment import sandbox
from treadle.alignment.sandbox import Outcome, bubblewrap_works, run_python
from treadle.alignment.verifiers import marks
from treadle.core.errors import TreadleError
from treadle.data.records import Problem, user


def problem(verifier: str, answer: str = "", **metadata: Any) -> Problem:
    return Problem((user("?"),), answer, verifier, metadata)


# The sandbox

LIMITS = "resource limits alone"


@pytest.fixture(params=["bubblewrap", LIMITS])
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which programs are held."""
    if request.param == LIMITS:
        monkeypatch.setattr(sandbox, "bubblewrap_works", lambda: False)
    elif not bubblewrap_works():
        pytest.skip("bubblewrap is absent or may not be used")
    return request.param


def test_bubblewrap_is_used_where_it_works() -> None:
    """Else all tests of what it does would be skipped without a word."""
    try:
        plain = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
        works = subprocess.run(plain, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        works = False
    assert bubblewrap_works() == works
    assert run_python("").isolation == ("bubblewrap" if works else "rlimits")


@pytest.mark.parametrize("instead", ["os.symlink({secret!r}, name)", "os.mkfifo(name)"])
def test_output_is_what_was_written(isolated: str, instead: str, tmp_path: Path) -> None:
    """Nothing that a program puts in the place of a file is read for it, or waited for."""
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    source = (
        "import os\nfor name in os.listdir():\n    if name != 'main.py':\n"
        f"        os.remove(name); {instead.format(secret=str(secret))}\n"
    )
    assert run_python(source) == Outcome(0, "", "", False, isolated.replace(LIMITS, "rlimits"))


def test_nothing_is_left_behind(
    isolated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even folders that are nested more deeply than Python can take away."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nested = "import os\nfor _ in range(1500):\n    os.mkdir('a'); os.chdir('a')\nprint('deep')"
    try:
        assert run_python(nested).stdout == "deep\n"
        assert list(tmp_path.iterdir()) == []
    finally:  # pytest could not take them away either
        subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


def test_what_is_no_text_fails_by_itself(isolated: str) -> None:
    outcome = run_python("print('\ud800')")
    assert outcome.code == 1
    assert "UnicodeDecodeError" in outcome.stderr
    assert run_python("print(1)", stdin="\ud800").stdout == "1\n"


def test_input_need_not_be_read(isolated: str) -> None:
    assert run_python("print('done')", stdin="x" * 10**6).stdout == "done\n"


def test_a_program_that_is_killed_says_by_what(isolated: str) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run_python(source).code == (-9 if isolated == LIMITS else 128 + 9)


def test_no_program_fills_the_disk(tmp_path: Path) -> None:
    if not bubblewrap_works():
        pytest.skip("bubblewrap is absent or may not be used")
    source = (
        "import itertools\nfor folder in ('.', '/tmp', '/', '/usr'):\n    try:\n"
        "        for i in itertools.count():\n"
        "            open(f'{folder}/{i}', 'wb').write(bytes(2**20))\n"
        "    except OSError as error:\n        print(i, error.strerror)\n"
    )
    full, shut = "16 No space left on device", "0 Read-only file system"
    assert run_python(source).stdout.splitlines() == [full, full, shut, shut]


def test_output_and_status() -> None:
    outcome = run_python("print(input()); raise SystemExit(3)", stdin="hello\n")
    assert (outcome.code, outcome.stdout, outcome.timed_out) == (3, "hello\n", False)
    assert "ValueError: no" in run_python("raise ValueError('no')").stderr


@pytest.mark.parametrize(
    "source", ["while True: pass", "import time; time.sleep(60)", "input(); input(); input()"]
)
def test_programs_that_do_not_end(source: str) -> None:
    outcome = run_python(source + "\nprint('late')", stdin="x\nx\n", seconds=1.5)
    assert outcome.timed_out or outcome.code != 0
    assert "late" not in outcome.stdout


def test_memory_is_limited() -> None:
    outcome = run_python("x = bytearray(2**30)\nprint(len(x))", megabytes=256)
    assert outcome.code != 0
    assert "MemoryError" in outcome.stderr
    assert run_python("x = bytearray(2**27)\nprint(len(x))", megabytes=256).stdout == "134217728\n"


def test_output_is_limited() -> None:
    outcome = run_python("while True: print('x' * 10000)", seconds=5)
    assert outcome.code != 0
    assert len(outcome.stdout) == 2**20


def test_children_do_not_outlive_their_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without name spaces, whose processes end with them, the session is killed."""
    monkeypatch.setattr(sandbox, "bubblewrap_works", lambda: False)
    late = tmp_path / "late"
    source = (
        "import os, time\nif os.fork() == 0:\n    print('child', flush=True)\n    time.sleep(1)\n"
        f"    open({str(late)!r}, 'w')\n    time.sleep(60)\ntime.sleep(0.5)\nprint('parent')\n"
    )
    outcome = run_python(source, seconds=30)
    assert (outcome.code, outcome.stdout) == (0, "child\nparent\n")
    time.sleep(1.5)
    assert not late.exists()


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "hidden")
    assert "None" in run_python("import os; print(os.environ.get('SOME_SECRET'))").stdout


@pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap is absent or may not be used")
def test_bubblewrap_hides_network_and_files(tmp_path) -> None:
    (tmp_path / "secret").write_text("hidden")
    source = (
        "import os, socket\n"
        f"print(os.path.exists({str(tmp_path)!r}))\n"
        "try:\n"
        "    socket.create_connection(('1.1.1.1', 53), timeout=1)\n"
        "    print('out')\n"
        "except OSError as error:\n"
        "    print('no network')\n"
    )
    outcome = run_python(source)
    assert outcome.stdout.split("\n")[:2] == ["False", "no network"]
    assert outcome.isolation == "bubblewrap"


# Code

ADD = problem("code", tests=["assert add(1, 2) == 3", "assert add(-1, 1) == 0"])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        ("def add(a, b): return a + b", 1.0),
        ("```\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("```python\ndef add(a, b):\n    return a + b\n```\n```python\nadd = None\n```", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("raise SystemExit(0)", 0.0),
        ("def add(a, b):\n    while True: pass", 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
    ],
)
def test_code(completion: str, expected: float) -> None:
    assert marks(ADD, completion) == expected


NINE, QUARTER = "assert square(3) == 9", "assert abs(square(0.5) - 0.25) < 1e-6"
EQUAL = "class Equal:\n    def __eq__(self, other): return True\n"
NEAR = "class Near:\n    def __sub__(self, other): return 0.0\n"


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (NINE, "import sys, os\nprint(sys.stdin.readline(), flush=True)\nos._exit(0)"),
        (NINE, "import sys\nprint(sys.stdin.read())\ndef square(x): raise SystemExit(0)"),
        (NINE, "def square(x): raise SystemExit"),
        (NINE, "def square(x):\n    import os\n    os._exit(0)"),
        (NINE, f"{EQUAL}def square(x): return Equal()"),
        (NINE, f"{EQUAL}def square(x): return [Equal()][0]"),
        (NINE, "import sys\nsys._getframe(1).f_globals['tests'] = ''"),
        (
            NINE,
            "import re\nright = re.findall('== ([0-9]+)', open('main.py').read())\n"
            "def square(x): return int(right[-1])",
        ),
        (QUARTER, f"{NEAR}def square(x): return Near()"),
        (QUARTER, "def abs(x): return 0\ndef square(x): return 9"),
        (QUARTER, "import builtins\nbuiltins.abs = lambda x: 0\ndef square(x): return 9"),
    ],
)
def test_a_program_cannot_say_that_it_passed(isolated: str, tests: str, program: str) -> None:
    """By no word that it hears, by no way to end, and by no object that equals everything."""
    assert marks(problem("code", tests=tests), program) == 0.0


POINT = """
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __len__(self): return 2
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __str__(self): return f"<{self.x}, {self.y}>"
class Odd(ValueError): pass
import math, re
from collections import Counter, namedtuple
Pair = namedtuple("Pair", "a b")
def halved(x):
    if x % 2: raise Odd("odd: %d" % x)
    return x // 2
def sort(rows, key=None): rows.sort(key=key)
def least(x, y): return min(x, y, key=lambda p: p.x)
def upto(n):
    for i in range(n): yield i
def given(*args, **named): return args, named
"""


@pytest.mark.parametrize(
    "tests",
    [
        "p = Point(1, 2); assert p.x == 1 and len(p) == 2 and p[1] == 2 and str(p) == '<1, 2>'",
        "assert Point(1, 2) + Point(2, 1) == Point(3, 3) != Point(1, 1)",
        "p = Point(1, 2); p.x = 5; assert p == Point(5, 2) and isinstance(p, Point)",
        "assert list(Point(1, 2)) == [1, 2] and 2 in Point(1, 2)",
        "assert least(Point(2, 0), Point(1, 7)).y == 7",
        "assert halved(4) == 2\ntry: halved(3)\nexcept Odd as e: assert str(e) == 'odd: 3'\n"
        "else: raise AssertionError",
        "try: halved(3)\nexcept ValueError: pass\nelse: raise AssertionError",
        "try: given().nothing\nexcept AttributeError: pass\nelse: raise AssertionError",
        "rows = [3, 1, 2]; sort(rows); assert rows == [1, 2, 3]",
        "rows = [3, 1, 2]; sort(rows=rows, key=lambda x: -x); assert rows == [3, 2, 1]",
        "points = [Point(2, 0), Point(1, 0)]; sort(points, lambda p: p.x)\nassert points[0].x == 1",
        "assert list(upto(3)) == [0, 1, 2] and next(upto(1)) == 0",
        "assert Counter('aab') == {'a': 2, 'b': 1} and Pair(1, 2) == (1, 2)",
        "values = None, True, 2**20000, 0.1, -0.0, 1e400, 'ä\\n\\ud800', b'x\\0', 1j, {1: (2,)},"
        " {3}, frozenset({4}), [[], ()], int\n"
        "found, named = given(*values, kind=values)\n"
        "assert found == values and repr(found) == repr(values) and named == {'kind': values}",
        "assert math.isnan(given(math.nan)[0][0]) and re.match('a', 'ab')",
        "def check(candidate):\n    assert candidate(6) == 3\ncheck(halved)",
    ],
)
def test_programs_are_used_as_if_they_were_here(tests: str) -> None:
    """Their objects, exceptions, generators and functions, and functions of the tests in them."""
    assert marks(problem("code", tests=tests), POINT) == 1.0
    with_error = f"{tests}\nassert halved(4) == 3"
    assert marks(problem("code", tests=with_error), POINT) == 0.0


def test_a_program_may_be_asked_for_a_builtin() -> None:
    asked = problem("code", tests="assert sum(10, 15) == 25\nassert sum(-10, 20) == 10")
    assert marks(asked, "def sum(a, b): return a + b") == 1.0
    assert marks(asked, "def add(a, b): return a + b") == 0.0


@pytest.mark.parametrize(
    "program",
    ["print('x' * 10**6)\ndef f(): print(1); return 2", "input()", "import sys; sys.exit(0)"],
)
def test_programs_print_to_nobody(program: str) -> None:
    expected = float("def f" in program)
    assert marks(problem("code", tests="assert f() == 2"), program) == expected


def test_the_one_ends_with_the_other(isolated: str) -> None:
    """The outcome is the first one's, whatever the second one does."""
    wait = "import sys\nassert sys.stdin.read() == 'heard'\nraise SystemExit(4)"
    assert sandbox.run_beside(wait, "print('heard', end='')").code == 4
    hang = sandbox.run_beside("print('x', flush=True)", "while True: pass", seconds=20)
    assert (hang.code, hang.timed_out) == (0, False)
    late = sandbox.run_beside("input()", "while True: pass", seconds=0.5)
    assert late.timed_out
    assert late.code != 0
    assert sandbox.run_beside("open(0).read(); 1 / 0", "").stderr.endswith("by zero\n")


def test_code_needs_tests() -> None:
    with pytest.raises(TreadleError, match="has no tests: put them in `tests`"):
        marks(problem("code"), "pass")
    with pytest.raises(TreadleError, match="`tests` is a int"):
        marks(problem("code", tests=3), "pass")
    with pytest.raises(TreadleError, match="has no tests: put them in `tests`"):
        marks(problem("code", tests=[" ", "\n"]), "pass")


@pytest.mark.parametrize(
    ("verifier", "library", "extra"),
    [("math", "math_verify", "math-verify"), ("json_schema", "jsonschema", "jsonschema")],
)
def test_missing_libraries_are_named(
    verifier: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(TreadleError, match=f"need.? {extra}: pip install 'treadle"):
        marks(problem(verifier, "{}"), "{}")


def test_real_programs_pass_their_own_tests(shared_data) -> None:
    import gzip

    with gzip.open(shared_data / "eval" / "mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(8), strict=False)]
    for row in rows:
        asked = problem("code", test_list=row["test_list"])
        assert marks(asked, row["code"]) == 1.0, row["text"]
        assert marks(asked, "def nothing(): pass") == 0.0


# Text

SCHEMA = json.dumps(
    {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"age": 3}', 1.0),
        ('```json\n{"age": 3}\n```', 1.0),
        ('\n ```json\n{"age": 3}\n``` \n', 1.0),
        ('{"age": "3"}', 0.5),
        ("{}", 0.5),
        ('{"age": 3', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json(completion: str, expected: float) -> None:
    assert marks(problem("json_schema", SCHEMA), completion) == expected


def test_schemas_are_checked() -> None:
    for wrong in ('{"type": "objekt"}', "{"):
        with pytest.raises(TreadleError, match="is no JSON schema"):
            marks(problem("json_schema", wrong), "{}")


def test_patterns() -> None:
    asked = problem("regex", r"[A-Z]\w+ (ist|war) .*\.")
    assert marks(asked, " Das ist gut. ") == 1.0
    assert marks(asked, "das ist gut.") == 0.0
    with pytest.raises(TreadleError, match="is no regular expression"):
        marks(problem("regex", "("), "x")


CALLS = json.dumps([{"name": "f", "arguments": {"x": 1, "y": "a"}}, {"name": "g", "arguments": {}}])


def said(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)


F, G = {"name": "f", "arguments": {"y": "a", "x": 1}}, {"name": "g", "arguments": {}}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (said(F, G), 1.0),
        (said(G, F), 1.0),
        (said(G), 0.25),
        (said(F, G, G), 0.5 * 2 / 3),
        (said({**F, "arguments": {"x": 2}}, G), 0.5),
        ("<tool_call>{broken</tool_call>", 0.0),
        ("<tool_call>[1]</tool_call>", 0.0),
        ("no call", 0.0),
    ],
)
def test_tool_calls(completion: str, expected: float) -> None:
    assert marks(problem("tool_calls", CALLS), completion) == pytest.approx(expected)


def test_no_call_can_be_what_is_asked() -> None:
    assert marks(problem("tool_calls", "[]"), "I cannot.") == 1.0
    assert marks(problem("tool_calls", "[]"), said(G)) == 0.0
    with pytest.raises(TreadleError, match="is no list of tool calls"):
        marks(problem("tool_calls", '{"name": "f"}'), "x")


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", r"So it is \boxed{0.5}.", 1.0),
        ("x^2+2x+1", r"Hence $(x+1)^2$", 1.0),
        ("12", r"\boxed{13}", 0.0),
        ("12", "no idea", 0.0),
    ],
)
def test_mathematics(answer: str, completion: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert marks(problem("math", answer), completion) == expected
