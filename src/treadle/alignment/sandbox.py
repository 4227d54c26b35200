"""Running code that a model wrote: limits on time, memory and output, no network, no files.

With bubblewrap (Linux) the code sees a read-only Python and an empty, private folder, and no
network exists for it. Without, only resource limits hold it: it could read the user's files and
use the network. `Outcome.isolation` says which it was.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from treadle.core.errors import TreadleError

Isolation = Literal["bubblewrap", "rlimits"]
OUTPUT = 2**20
"""Bytes that a program may write to a file or to its output."""
LIMITS = """\
import resource
limits = {{"CPU": {cpu}, "AS": {memory}, "FSIZE": {output}, "CORE": 0}}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
with open("main.py", encoding="utf-8") as file:
    program = compile(file.read(), "main.py", "exec")
exec(program, {{"__name__": "__main__"}})
"""
"""Runs first in the new process; limits that are set so cannot be raised again."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    code: int
    """Its exit status; negative: the signal that killed it."""
    stdout: str
    stderr: str
    timed_out: bool
    isolation: Isolation


def run_python(
    source: str, *, stdin: str = "", seconds: float = 5.0, megabytes: int = 512
) -> Outcome:
    """Run a Python program of its own; whatever it does, this returns.

    Raises:
        TreadleError: the system has no resource limits (not POSIX).
    """
    if os.name != "posix":
        raise TreadleError("running a model's code needs Linux or macOS: nothing would limit it")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.py").write_text(source, encoding="utf-8")
        isolation: Isolation = "bubblewrap" if bubblewrap_works() else "rlimits"
        limits = LIMITS.format(cpu=int(seconds) + 1, memory=megabytes * 2**20, output=OUTPUT)
        command = [os.path.realpath(sys.executable), "-I", "-S", "-c", limits]
        if isolation == "bubblewrap":
            command = [*_bubblewrap(folder), *command]
        with (
            open(Path(folder, ".out"), "w+b") as out,  # files, so that limits on them hold
            open(Path(folder, ".err"), "w+b") as err,
        ):
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            timed_out = False
            try:
                process.communicate(stdin.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            except BrokenPipeError:  # it ended without reading its input
                process.wait(timeout=seconds)
            finally:
                _end(process)
            return Outcome(
                code=process.returncode,
                stdout=_read(out.name),
                stderr=_read(err.name),
                timed_out=timed_out,
                isolation=isolation,
            )


@cache
def bubblewrap_works() -> bool:
    """Whether bubblewrap is there and may make name spaces (some containers forbid it)."""
    if shutil.which("bwrap") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        probe = subprocess.run(
            [*_bubblewrap(folder), "/bin/true"], capture_output=True, timeout=20, check=False
        )
    return probe.returncode == 0


def _bubblewrap(folder: str) -> list[str]:
    prefix = os.path.realpath(sys.base_prefix)
    shown = [p for p in ("/usr", "/lib", "/lib64", "/bin", prefix) if os.path.exists(p)]
    binds = [word for path in dict.fromkeys(shown) for word in ("--ro-bind", path, path)]
    private = ["--tmpfs", "/tmp", "--bind", folder, "/box", "--chdir", "/box"]
    return ["bwrap", "--unshare-all", "--die-with-parent", *binds, "--proc", "/proc", *private]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session: children that a program left behind go with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: str) -> str:
    return Path(path).read_bytes()[:OUTPUT].decode("utf-8", "replace")
