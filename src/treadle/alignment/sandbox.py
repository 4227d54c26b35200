"""Running code that a model wrote: limits on time, memory and output, no network, no files.

With bubblewrap (Linux) the code sees a read-only Python and an empty, private folder that ends with
it, and no network exists for it. Without, only resource limits hold it: it could read the user's
files, fill the disk and use the network. `Outcome.isolation` says which it was. The limit on
memory is that of a process; in bubblewrap their number is limited too, but never for root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from treadle.core.errors import TreadleError

Isolation = Literal["bubblewrap", "rlimits"]
Channel = int | IO[bytes]
OUTPUT = 2**20
"""Bytes that a program may write to a file or to its output."""
FILES = 2**24
"""Bytes of all its files in one of the folders that it may write to, in bubblewrap."""
PROCESSES = 64
LIMITS = """\
import resource
for name, value in {limits!r}.items():
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
    """Its exit status. Killed by signal n: -n, in bubblewrap 128 + n."""
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
    # The output goes to files, so that limits on them hold, which have no name that the program
    # could put something else in the place of.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _started(source, _limits(seconds, megabytes), subprocess.PIPE, out, err) as process:
            timed_out = _overtime(process, stdin.encode("utf-8", "surrogatepass"), seconds)
        return Outcome(process.returncode, _read(out), _read(err), timed_out, _isolation())


def run_beside(source: str, other: str, *, seconds: float = 5.0, megabytes: int = 512) -> Outcome:
    """Run two Python programs that do not see each other: each one's output is the other's input.

    The outcome, which has no output, is that of the first; the other one ends with it.

    Raises:
        TreadleError: the system has no resource limits (not POSIX).
    """
    limits, null = _limits(seconds, megabytes), subprocess.DEVNULL
    here, there = socket.socketpair()
    with tempfile.TemporaryFile() as err:
        with (
            here,
            there,
            _started(other, limits, there.fileno(), there.fileno(), null),
            _started(source, limits, here.fileno(), here.fileno(), err) as process,
        ):
            # Only when nobody else holds them does each one see that the other has ended.
            here.close()
            there.close()
            timed_out = _overtime(process, None, seconds)
        return Outcome(process.returncode, "", _read(err), timed_out, _isolation())


def _isolation() -> Isolation:
    return "bubblewrap" if bubblewrap_works() else "rlimits"


def _limits(seconds: float, megabytes: int) -> dict[str, int]:
    limits = {"CPU": int(seconds) + 1, "AS": megabytes * 2**20, "FSIZE": OUTPUT, "CORE": 0}
    return limits | ({"NPROC": PROCESSES} if bubblewrap_works() else {})


@contextmanager
def _started(
    source: str, limits: dict[str, int], stdin: Channel, stdout: Channel, stderr: Channel
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs; in the end it is killed and its files are taken away."""
    if os.name != "posix":
        raise TreadleError("running a model's code needs Linux or macOS: nothing would limit it")
    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", LIMITS.format(limits=limits)]
    folder = tempfile.mkdtemp()
    try:
        # What is no text stays none: the program then fails by itself.
        Path(folder, "main.py").write_text(source, "utf-8", "surrogatepass")
        process = subprocess.Popen(
            [*_bubblewrap(folder), *command] if bubblewrap_works() else command,
            cwd=folder,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)
    finally:
        # Unlike shutil.rmtree, it knows folders that are nested without end.
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


def _overtime(process: subprocess.Popen[bytes], stdin: bytes | None, seconds: float) -> bool:
    """Wait for the end; whether it took too long."""
    try:
        process.communicate(stdin, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


@cache
def bubblewrap_works() -> bool:
    """Whether bubblewrap is there and may make name spaces (some containers forbid it)."""
    if shutil.which("bwrap") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.py").touch()
        probe = subprocess.run(
            [*_bubblewrap(folder), "/bin/true"], capture_output=True, timeout=20, check=False
        )
    return probe.returncode == 0


def _bubblewrap(folder: str) -> list[str]:
    prefix = os.path.realpath(sys.base_prefix)
    shown = [p for p in ("/usr", "/lib", "/lib64", "/bin", prefix) if os.path.exists(p)]
    binds = [word for path in dict.fromkeys(shown) for word in ("--ro-bind", path, path)]
    private = [w for path in ("/tmp", "/box") for w in ("--size", str(FILES), "--tmpfs", path)]
    program = ["--ro-bind", os.path.join(folder, "main.py"), "/box/main.py"]
    rest = ["--proc", "/proc", "--remount-ro", "/", "--chdir", "/box"]
    return ["bwrap", "--unshare-all", "--die-with-parent", *binds, *private, *program, *rest]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session: children that a program left behind go with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(OUTPUT).decode("utf-8", "replace")
