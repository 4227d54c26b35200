"""The metadata of a GGUF file as Python values, read with every length checked, and written.

A value is a bool, int, float, str, or a tuple of values of one type. Type names are those of
the format, with brackets for arrays: `uint32`, `string`, `[float32]`.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from treadle.core.errors import FileFormatError, TreadleError, did_you_mean

Value = bool | int | float | str | tuple["Value", ...]

_ARRAY, _STRING = 9, 8
_MOST_NESTED = 4
_CODES: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("uint8", "B"),
        1: ("int8", "b"),
        2: ("uint16", "H"),
        3: ("int16", "h"),
        4: ("uint32", "I"),
        5: ("int32", "i"),
        6: ("float32", "f"),
        7: ("bool", "?"),
        8: ("string", ""),
        10: ("uint64", "Q"),
        11: ("int64", "q"),
        12: ("float64", "d"),
    }
)
"""Number in the file -> name, and letter for `struct`."""
_NUMBERS = {name: number for number, (name, _) in _CODES.items()}


@dataclass
class Cursor:
    """A place in a file's bytes; nothing is read, or made room for, beyond their end."""

    path: Path
    data: memoryview
    at: int = 0

    def fail(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: {what} (at byte {self.at:,}); fetch the file again")

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if count > left:
            raise self.fail(f"cut off or corrupt: {what} takes {count:,} bytes, {left:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def uint32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def uint64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, least: int, what: str) -> int:
        """A number of things that take at least `least` bytes each."""
        count, left = self.uint64(what), len(self.data) - self.at
        if count * least > left:
            raise self.fail(f"cut off or corrupt: {count:,} {what} in {left:,} bytes")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.uint64(what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8: {bytes(raw[:40])!r}") from None

    def value(self, what: str) -> tuple[Value, str]:
        """A type number and the value that follows, with the name of its type."""
        return self._value(self.uint32(f"the type of {what}"), what, 0)

    def _value(self, code: int, what: str, depth: int) -> tuple[Value, str]:
        if code == _ARRAY:
            return self._array(what, depth + 1)
        if code not in _CODES:
            raise self.fail(f"{what} is of unknown type {code}")
        name, letter = _CODES[code]
        if code == _STRING:
            return self.string(what), name
        raw = self.take(struct.calcsize(f"<{letter}"), what)
        value: Value
        if letter == "?" and raw[0] > 1:
            raise self.fail(f"{what} is neither true nor false but {raw[0]}")
        (value,) = struct.unpack(f"<{letter}", raw)
        return value, name

    def _array(self, what: str, depth: int) -> tuple[Value, str]:
        if depth > _MOST_NESTED:
            raise self.fail(f"{what} nests arrays more than {_MOST_NESTED} deep")
        code = self.uint32(f"the type of {what}")
        if code == _ARRAY:
            items = [self._value(code, what, depth) for _ in range(self.count(12, what))]
            kinds = {kind for _, kind in items} or {"[uint8]"}
            if len(kinds) > 1:
                raise self.fail(f"{what} mixes arrays of {', '.join(sorted(kinds))}")
            return tuple(value for value, _ in items), f"[{kinds.pop()}]"
        if code not in _CODES:
            raise self.fail(f"{what} is of unknown type {code}")
        name, letter = _CODES[code]
        if code == _STRING:
            return tuple(self._strings(self.count(8, what), what)), f"[{name}]"
        size = struct.calcsize(f"<{letter}")
        count = self.count(size, what)
        raw = self.take(count * size, what)
        if letter == "?" and bytes(raw).strip(b"\0\1"):
            raise self.fail(f"{what} has entries that are neither true nor false")
        return struct.unpack(f"<{count}{letter}", raw), f"[{name}]"

    def _strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has hundreds of thousands of strings: one plain loop."""
        data, at, end = self.data, self.at, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > end:
                    raise struct.error
                texts.append(str(data[start:at], "utf-8"))
        except struct.error:
            raise self.fail(f"cut off or corrupt: {what}, entry {len(texts):,}") from None
        except UnicodeDecodeError:
            raise self.fail(f"{what}, entry {len(texts):,}, is not UTF-8") from None
        self.at = at
        return texts


def guess_type(value: Value) -> str:
    """The type that llama.cpp's keys use: uint32, int32 where negative or in arrays, float32.

    Raises:
        TreadleError: the value is of a kind that GGUF does not hold, or a mixed or empty array.
    """
    match value:
        case bool():
            return "bool"
        case int() if 0 <= value < 1 << 32:
            return "uint32"
        case int() if value < 0:
            return "int32" if value >= -(1 << 31) else "int64"
        case int():
            return "uint64"
        case float():
            return "float32"
        case str():
            return "string"
        case tuple() if value:
            return f"[{_common({_guess_item(item) for item in value})}]"
    raise TreadleError(
        f"cannot tell the type of {reprlib.repr(value)}: give a bool, int, float, str or "
        "a tuple of one of them, or name the type, such as `[string]`"
    )


def _guess_item(item: Value) -> str:
    if isinstance(item, int) and not isinstance(item, bool):
        return "int32" if -(1 << 31) <= item < 1 << 31 else "int64"
    return guess_type(item)


def _common(kinds: set[str]) -> str:
    if kinds == {"int32", "int64"}:
        return "int64"
    if len(kinds) > 1:
        raise TreadleError(f"an array holds values of one type, not {', '.join(sorted(kinds))}")
    return kinds.pop()


def encode_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Value, kind: str) -> bytes:
    """The number of `kind` and `value`, as bytes.

    Raises:
        TreadleError: the value does not fit the type.
    """
    code = _code(kind)
    return struct.pack("<I", code) + _body(value, kind)


def _body(value: Value, kind: str) -> bytes:
    try:
        if kind.startswith("["):
            if not isinstance(value, tuple):
                raise TypeError
            inner = kind[1:-1]
            head = struct.pack("<IQ", _code(inner), len(value))
            if inner.startswith("[") or inner == "string":
                return head + b"".join(_body(item, inner) for item in value)
            return head + struct.pack(f"<{len(value)}{_CODES[_code(inner)][1]}", *value)
        if kind == "string":
            if not isinstance(value, str):
                raise TypeError
            return encode_string(value)
        if (kind == "bool") != isinstance(value, bool):
            raise TypeError
        return struct.pack(f"<{_CODES[_code(kind)][1]}", value)
    except (struct.error, OverflowError, TypeError):
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:56]} ..."
        raise TreadleError(f"{shown} does not fit the type {kind}") from None


def _code(kind: str) -> int:
    if kind.startswith("[") and kind.endswith("]"):
        return _ARRAY
    if kind not in _NUMBERS:
        raise TreadleError(f"unknown type `{kind}`{did_you_mean(kind, _NUMBERS)}")
    return _NUMBERS[kind]
