from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from treadle.core import files
from treadle.core.errors import TreadleError
from treadle.core.files import (
    atomic_directory,
    atomic_file,
    require_space,
    sha256,
    write_json,
    write_text,
)

SOURCE = Path(__file__).parents[2] / "src"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def write_then_raise(writer: AbstractContextManager[Path], name: str, error: BaseException) -> None:
    with writer as temporary:
        (temporary / name if name else temporary).write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_files_import_no_torch():
    done = python("import sys, treadle.core.files; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_file_appears_whole_with_its_name(tmp_path):
    target = tmp_path / "new" / "folder" / "a.npy"
    with atomic_file(target) as temporary:
        assert temporary.name == "a.npy"  # libraries look at the suffix
        assert not target.exists()
        temporary.write_bytes(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert names(target.parent) == ["a.npy"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_keeps_the_old_content(tmp_path, error):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(error):
        write_then_raise(atomic_file(target), "", error())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_directory_replaces_the_old_one_entirely(tmp_path):
    target = tmp_path / "step-1"
    for content in ("first", "second"):
        with atomic_directory(target) as temporary:
            (temporary / content).write_text(content)
            (temporary / "deep").mkdir()
            (temporary / "deep" / "x").write_text(content)
        assert names(target) == ["deep", content]
        assert (target / "deep" / "x").read_text() == content
    assert names(tmp_path) == ["step-1"]


def test_directory_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    test_directory_replaces_the_old_one_entirely(tmp_path)


def test_directory_exception_keeps_the_old_one(tmp_path):
    target = tmp_path / "step"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError):
        write_then_raise(atomic_directory(target), "b", RuntimeError())
    assert names(target) == ["a"]
    assert names(tmp_path) == ["step"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    original, link = tmp_path / "original", tmp_path / "link"
    original.write_text("kept")
    link.symlink_to(original)
    write_text(link, "new")
    assert (original.read_text(), link.read_text()) == ("kept", "new")
    assert not link.is_symlink()


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_directory"])
def test_killed_writer_leaves_the_old_content_and_is_swept(tmp_path, kind):
    target = tmp_path / "thing"
    write_text(target, "old") if kind == "atomic_file" else (target.mkdir())
    before = target.stat().st_ino
    inside = "t.write_text('half')" if kind == "atomic_file" else "(t / 'x').write_text('half')"
    done = python(
        f"import os, sys\nfrom treadle.core.files import {kind}\n"
        f"with {kind}(sys.argv[1]) as t:\n    {inside}; os.kill(os.getpid(), 9)",
        str(target),
    )
    assert done.returncode == -signal.SIGKILL
    assert target.stat().st_ino == before
    assert len(names(tmp_path)) == 2  # the leftover
    write_text(tmp_path / "other", "")
    assert names(tmp_path) == ["other", "thing"]


def test_a_living_writer_is_not_swept(tmp_path):
    with atomic_file(tmp_path / "a") as first:
        first.write_text("a")
        write_text(tmp_path / "b", "b")
        assert first.read_text() == "a"
    assert names(tmp_path) == ["a", "b"]


def test_leftovers_of_other_machines_stay_a_week(tmp_path):
    foreign = tmp_path / ".a.00000000-1-00000000.tmp"
    foreign.mkdir()
    write_text(tmp_path / "b", "")
    assert foreign.exists()
    os.utime(foreign, (0, 0))
    write_text(tmp_path / "b", "")
    assert not foreign.exists()


def test_concurrent_writers_leave_one_whole_version(tmp_path):
    target = tmp_path / "folder"

    def work(index: int) -> None:
        for _ in range(10):
            with atomic_directory(target) as temporary:
                for name in "ab":
                    (temporary / name).write_text(str(index))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["folder"]
    assert (target / "a").read_text() == (target / "b").read_text()


def test_wrong_kinds_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TreadleError, match=r"folder: a file is to be written here"),
        atomic_file(tmp_path / "folder"),
    ):
        pass
    with (
        pytest.raises(TreadleError, match=r"file: a folder is to be written here"),
        atomic_directory(tmp_path / "file"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_file(tmp_path / "x"):
        pass


def test_space_is_checked_before_writing(tmp_path):
    needed = 1 << 60
    with pytest.raises(TreadleError, match=rf"big: not enough disk space: {needed:,} bytes needed"):
        require_space(tmp_path / "big", needed)
    with (
        pytest.raises(TreadleError, match=r"[\d,]+ free; free some"),
        atomic_file(tmp_path / "big", needed=needed),
    ):
        raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("io: No space left on device"),
    ],
    ids=["ENOSPC", "EDQUOT", "wrapped"],
)
def test_a_full_disk_is_named(tmp_path, error):
    with pytest.raises(TreadleError, match=r"big: the disk is full: 4 bytes of 9 needed .* free"):
        write_then_raise(atomic_file(tmp_path / "big", needed=9), "", error)
    assert names(tmp_path) == []


def test_a_truly_full_disk(tmp_path):
    """A 1 MB file system of its own, where the system allows one."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    code = (
        "import sys, pathlib\nfrom treadle.core.files import *\n"
        "p = pathlib.Path(sys.argv[1]) / 'big'\nwrite_text(p, 'old')\n"
        "try:\n    write_text(p, 'x' * 3_000_000)\n"
        "except ValueError as e: print(e)\nprint(p.read_text(), len(list(p.parent.iterdir())))\n"
    )
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, code],
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    message, rest = done.stdout.splitlines()
    assert "the disk is full" in message
    assert rest == "old 1"


def test_json_and_sha256(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None], "a": "ä"}
    assert path.read_text(encoding="utf-8").index('"b"') < path.read_text().index('"a"')
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
