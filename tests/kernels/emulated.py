"""The native library of another processor, compiled here and run by an emulator.

`Emulated` answers to the functions of the compiled kernels (`build.py`), so that the tests
of the native kernels run on it as they are. Handles are numbers from 1 on.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from treadle.kernels.compiler import ALWAYS
from treadle.kernels.native.build import FLAGS, SOURCES, Pass, Rope, Shape
from treadle.kernels.native.levels import Level

HERE = Path(__file__).parent
STRIP = 32


@dataclass(frozen=True)
class Target:
    """A kind of processor: who compiles for it, and who plays it."""

    compiler: str
    emulator: tuple[str, ...]


class Emulated:
    """The library for `level` in a process of its own."""

    def __init__(self, target: Target, level: Level, folder: Path) -> None:
        program = folder / f"{level.name}-emulated"
        flags = [f for f in (*ALWAYS, *FLAGS, *level.flags) if f not in ("-shared", "-fPIC")]
        source = str(HERE / "emulated.cpp")
        command = [target.compiler, *flags, "-static", f"-I{SOURCES}", source, "-o", str(program)]
        subprocess.run(command, check=True)
        self.process = subprocess.Popen(
            [*target.emulator, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.loading = Lock()  # matrices come from several threads at once
        self.shapes: list[tuple[int, int]] = []
        self.decoders: list[tuple[Shape, object]] = []

    def __enter__(self) -> Emulated:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def treadle_level(self) -> bytes:
        return self._ask(b"l", 16).rstrip(b"\0")

    def treadle_in_large_pages(self, start: int, nbytes: int) -> None:
        pass

    def treadle_arena(self, nbytes: int) -> int:
        return 1

    def treadle_free_arena(self, arena: int) -> None:
        pass

    treadle_free_matrix = treadle_free_decoder = treadle_free_arena
    """All is kept as long as the process lives."""

    def treadle_matrix(self, arena: int, format: int, rows: int, columns: int, data: int) -> int:
        from treadle.kernels.blocks import block_format
        from treadle.kernels.native.matrix import FORMATS

        kind = block_format(FORMATS[format])
        nbytes = rows * columns // kind.block_size * kind.block_bytes
        with self.loading:
            self._send(b"m", _ints(format, rows, columns), _array(data, nbytes, np.uint8))
            self.shapes.append((rows, columns))
            return len(self.shapes)

    def treadle_unpack_row(self, matrix: int, row: int, y: Any) -> None:
        columns = self.shapes[matrix - 1][1]
        found = self._ask(b"u", 4 * columns, _ints(matrix - 1, row))
        ctypes.memmove(y, found, len(found))

    def treadle_multiply(self, matrix: int, x: int, count: int, y: int) -> int:
        rows, columns = self.shapes[matrix - 1]
        rest = _ints(matrix - 1, count), _array(x, count * columns, np.float32)
        found = self._ask(b"x", 4 * count * rows, *rest)
        ctypes.memmove(y, found, len(found))
        return 0

    def treadle_decoder(
        self,
        shape: Shape,
        threads: int,
        matrices: Sequence[int],
        vectors: Sequence[int | None],
        windows: Sequence[int],
        rope_of: Sequence[int],
        ropes: Sequence[Rope],
    ) -> int:
        lengths = _vector_lengths(shape)
        self._send(
            b"d",
            bytes(shape),
            np.int32(threads).tobytes(),
            _ints(*(m - 1 for m in matrices)),
            np.int32(len(lengths)).tobytes(),
            *(_array(v, n, np.float32) for v, n in zip(vectors, lengths, strict=True)),
            _ints(*windows),
            _ints(*rope_of),
            *(
                np.float32(r.factor).tobytes() + _array(r.frequencies, r.count, np.float32)
                for r in ropes
            ),
        )
        self.decoders.append((shape, (vectors, ropes)))
        return len(self.decoders)

    def treadle_run(self, decoder: int, batch: Pass) -> int:
        shape, _ = self.decoders[decoder - 1]
        counts, starts, outputs, table_at = (
            np.ctypeslib.as_array(
                ctypes.cast(p, ctypes.POINTER(ctypes.c_int32)), (batch.sequences,)
            )
            for p in (batch.counts, batch.starts, batch.outputs, batch.table_at)
        )
        numbers = int(table_at[-1] + -(-(starts[-1] + counts[-1]) // shape.page))
        tables = ctypes.string_at(batch.tables, 4 * numbers)
        pages = int(np.frombuffer(tables, np.int32).max()) + 1
        cells = pages * shape.layers * shape.kv_heads * 2 * shape.page * shape.head_dim
        hidden = batch.hidden is not None
        rows = int(counts.sum() if hidden else outputs.sum())
        stride = shape.dim if hidden else batch.stride
        found = self._ask(
            b"p",
            4 + 2 * cells + 4 * rows * stride,
            _ints(decoder - 1, stride, rows, int(hidden)),
            _array(batch.tokens, int(counts.sum()), np.int32),
            *(_ints(*values) for values in (counts, starts, outputs)),
            _array(batch.tables, numbers, np.int32),
            _ints(*table_at),
            _array(batch.pages, cells, np.uint16),
        )
        ctypes.memmove(batch.pages, found[4:], 2 * cells)
        result = found[4 + 2 * cells :]
        if result:
            ctypes.memmove(batch.hidden if hidden else batch.logits, result, len(result))
        return int(np.frombuffer(found[:4], np.int32)[0])

    def treadle_matrix_bytes(self, format: int, rows: int, columns: int) -> int:
        return 1

    def _send(self, *parts: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()

    def _ask(self, command: bytes, nbytes: int, *parts: bytes) -> bytes:
        assert self.process.stdout is not None
        self._send(command, *parts)
        found = self.process.stdout.read(nbytes)
        assert len(found) == nbytes, f"the emulated library ended: {self.process.poll()}"
        return found


def _vector_lengths(shape: Shape) -> list[int]:
    """Of the last norm; then of each layer of seven biases, four norms, and two of heads."""
    mixed, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    biases = (mixed, kv, kv, shape.dim, shape.hidden, shape.hidden, shape.dim)
    padded = [-(-n // STRIP) * STRIP for n in biases]
    each = [*padded, *[shape.dim] * 4, *[shape.head_dim] * 2]
    return [shape.dim, *each * shape.layers]


def _ints(*values: int) -> bytes:
    return np.array([len(values), *values], dtype=np.int32).tobytes()


def _array(start: int | None, count: int, dtype: Any) -> bytes:
    if start is None:
        return _ints()
    width = np.dtype(dtype).itemsize
    return np.int32(count).tobytes() + ctypes.string_at(start, count * width)
