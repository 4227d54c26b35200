"""Files that are whole or absent: atomic writes, checksums, and a clear word when the disk is full.

Everything is written in a hidden folder beside its destination, flushed to the disk and renamed
into place. An exception, a kill or a power cut leaves the old content, or nothing, and never a
half. What a killed process left behind is removed by the next write in the same folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from treadle.core.errors import TreadleError

StrPath = str | os.PathLike[str]

_HOLDER = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
_FOREIGN_AGE = 7 * 86400.0
"""Seconds until the leftover of another machine, whose processes cannot be seen, is removed."""
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: StrPath, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path of the same file name; on success it becomes `path`.

    Args:
        needed: bytes that will be written, where known: checked against the free space first.

    Raises:
        TreadleError: the disk is full, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise TreadleError(f"{path}: a file is to be written here, but this is a folder")
    with staging(path, needed=needed) as temporary:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(f"{path}: nothing was written to {temporary}")
        publish(temporary, path)


@contextmanager
def atomic_directory(path: StrPath, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a new empty folder of the same name; on success it becomes, or replaces, `path`.

    Args:
        needed: bytes that will be written, where known: checked against the free space first.

    Raises:
        TreadleError: the disk is full, or `path` is a file.
    """
    path = Path(path)
    if path.is_file():
        raise TreadleError(f"{path}: a folder is to be written here, but this is a file")
    with staging(path, needed=needed) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _move_folder(temporary, path)


@contextmanager
def staging(path: StrPath, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a place for a temporary `path`, alone in a hidden folder beside it.

    The folder is removed at the end with all that was not moved out; `publish` moves a file.
    For writers of several files, whose order of appearance matters.

    Raises:
        TreadleError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    if needed is not None:
        require_space(path, needed)
    unique = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    holder = path.parent / f".{path.name[:100]}.{unique}.tmp"
    try:
        holder.mkdir()
        yield holder / path.name
        _sync(path.parent)
    except Exception as error:
        if not _is_out_of_space(error):
            raise
        written = sum(f.stat().st_size for f in holder.rglob("*") if f.is_file())
        more = f" of {needed:,} needed" if needed is not None else ""
        raise TreadleError(
            f"{path}: the disk is full: {written:,} bytes{more} were written, "
            f"{_free(path):,} are free; free some, or write to another disk"
        ) from error
    finally:
        try:
            holder.rmdir()  # as a rule it is empty; rmtree can lose a Ctrl-C that comes meanwhile
        except OSError:
            shutil.rmtree(holder, ignore_errors=True)


def publish(temporary: Path, path: StrPath) -> None:
    """Flush the file `temporary` to the disk and rename it to `path`."""
    _sync(temporary)
    temporary.replace(path)


def write_text(path: StrPath, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: StrPath, value: Any) -> None:
    """Write `value` as indented JSON, atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(path: StrPath, needed: int) -> None:
    """Raise TreadleError where the disk that holds `path` (present or not) lacks `needed` bytes."""
    free = _free(Path(path))
    if free < needed:
        raise TreadleError(
            f"{path}: not enough disk space: {needed:,} bytes needed, {free:,} free; "
            "free some, or write to another disk"
        )


def _is_out_of_space(error: Exception) -> bool:
    """Libraries in Rust and C++ wrap the system's error in one of their own, keeping its text."""
    if isinstance(error, OSError) and error.errno in _OUT_OF_SPACE:
        return True
    return any(os.strerror(number) in str(error) for number in _OUT_OF_SPACE)


def _free(path: Path) -> int:
    present = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(present).free


def _host() -> str:
    """Where a process id means something: this machine, and this container on it."""
    with suppress(OSError):
        space = os.stat("/proc/self/ns/pid").st_ino
        return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`; what others write now is left alone."""
    host, now = _host(), time.time()
    for entry in os.scandir(folder):
        match = _HOLDER.fullmatch(entry.name)
        if match is None:
            continue
        with suppress(FileNotFoundError):
            if match["host"] == host:
                dead = not psutil.pid_exists(int(match["pid"]))
            else:
                dead = now - entry.stat().st_mtime > _FOREIGN_AGE
            if dead:
                shutil.rmtree(entry.path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename never outruns its content."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was there is left in the holder, to be removed with it."""
    try:
        new.rename(path)
    except OSError:
        if not os.path.lexists(path):
            raise
        if not _exchange(new, path):
            aside = new.with_name(f"{new.name}.old")
            path.rename(aside)
            try:
                new.rename(path)
            except BaseException:
                aside.rename(path)
                raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux); False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)
