"""What runs in the sandbox to try a program: its tests in one process, the program in another.

The program sees what its functions are called with and hands back data. It does not see the tests,
and what it says or how it ends is no verdict: that is the status of the other process alone.
Numbers, texts and containers of them travel as copies (arguments that a call changed are changed
here as well); of anything else a name does, by which it can be used where it lives.

    tests -> program    [operation, object, arguments, named arguments]
    program -> tests    ["value", result, arguments afterwards] or ["error", base, class, text]

This file is run as it stands, by a Python without packages: it imports the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

CONTAINERS: Mapping[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
BOTH: Mapping[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "lt": operator.lt,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "instancecheck": lambda kind, value: isinstance(value, kind),
}
"""Asked of the program where both sides are its own. With a value of the tests on one side it could
call itself equal to, or near, whatever it is compared with."""
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    **BOTH,
    "call": lambda function, *args, **named: function(*args, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "hash": hash,
    "str": str,
    "repr": repr,
}


def run_tests(tests: str) -> None:
    """The process of the tests: raises where one fails."""
    line = Line({"call": OPERATIONS["call"]})
    names, modules = line.receive()
    space: dict[str, Any] = {"__name__": "tests"}
    for name in modules:
        if name in sys.stdlib_module_names:
            space[name] = importlib.import_module(name)
    found = {name: line.decoded(value) for name, value in names.items()}
    used = {n.id for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Name)} & set(found)
    own = {name for name in used if name not in vars(builtins)}
    # A program may be asked for a `sum` of its own, but one that is asked for something else does
    # not choose by what its answers are measured.
    space |= {name: found[name] for name in own or used}
    exec(compile(tests, "tests.py", "exec"), space)  # noqa: S102 - in the sandbox


def run_program(program: str) -> None:
    """The process of the program: does what it is asked until nobody asks any more."""
    line = Line(OPERATIONS)
    module = sys.modules["solution"] = ModuleType("solution")
    space = module.__dict__
    exec(compile(program, "solution.py", "exec"), space)  # noqa: S102 - in the sandbox
    names = {n: v for n, v in space.items() if not n.startswith("__")}
    modules = [n for n, v in names.items() if isinstance(v, ModuleType)]
    line.send([{n: line.encoded(v) for n, v in names.items() if n not in modules}, modules])
    while True:
        line.answer(line.receive())


class Line:
    """One end of the talk, over what were this process's standard input and output."""

    def __init__(self, served: Mapping[str, Callable[..., Any]]) -> None:
        sys.set_int_max_str_digits(0)
        self.served = served
        self.shown: list[object] = []
        self.errors: dict[tuple[str, str], type[Exception]] = {}
        self.hears = os.fdopen(os.dup(0), encoding="utf-8")
        self.says = os.fdopen(os.dup(1), "w", encoding="utf-8")
        # What the program prints is not for the other end, and it has no input.
        os.dup2(2, 1)
        end, other = os.pipe()
        os.close(other)
        os.dup2(end, 0)

    def send(self, message: object) -> None:
        self.says.write(json.dumps(message) + "\n")
        self.says.flush()

    def receive(self) -> Any:
        text = self.hears.readline()
        if not text:
            os._exit(1)  # no exception, which a test might expect
        return json.loads(text)

    def ask(self, what: str, it: Remote, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Have something done there; meanwhile it may ask for something to be done here."""
        self.send([what, *map(self.encoded, (it, args, named))])
        while (message := self.receive())[0] not in ("value", "error"):
            self.answer(message)
        if message[0] == "error":
            _, base, name, text = message
            raise self.error(base, name)(text)
        after = self.decoded(message[2])
        for before, now in zip((*args, *named.values()), after, strict=True):
            take_over(before, now)
        return self.decoded(message[1])

    def answer(self, message: list[Any]) -> None:
        """Do what is asked."""
        try:
            it, args, named = map(self.decoded, message[1:])
            value = self.served[message[0]](it, *args, **named)
            reply = ["value", self.encoded(value), self.encoded([*args, *named.values()])]
        except Exception as error:
            reply = ["error", *names_of(type(error)), str(error)]
        self.send(reply)

    def error(self, base: str, name: str) -> type[Exception]:
        """The exception of this name; one of the program's own is made after it."""
        kind = getattr(builtins, base, None)
        # Others, such as SystemExit, would end this process as the other wishes.
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = Exception
        if name == base:
            return kind
        return self.errors.setdefault((base, name), type(name, (kind,), {}))

    def encoded(self, value: object) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return ["bytes", value.hex()]
            case complex():
                return ["complex", value.real, value.imag]
            case dict():
                return ["dict", *([self.encoded(k), self.encoded(v)] for k, v in value.items())]
            case Remote():
                return ["yours", object.__getattribute__(value, "place")]
            case type() if issubclass(value, Exception):
                return ["exception", *names_of(value)]
            case type() if value in vars(builtins).values():
                return ["builtin", value.__name__]
        for name, kind in CONTAINERS.items():
            if isinstance(value, kind):
                items: Iterable[object] = value  # type: ignore[assignment]
                return [name, *map(self.encoded, items)]
        self.shown.append(value)
        return ["mine", len(self.shown) - 1]

    def decoded(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        match kind:
            case "bytes":
                return bytes.fromhex(rest[0])
            case "complex":
                return complex(*rest)
            case "dict":
                return {self.decoded(k): self.decoded(v) for k, v in rest}
            case "exception":
                return self.error(*rest)
            case "builtin":
                found = getattr(builtins, rest[0])
                return found if isinstance(found, type) else None
            case "yours":
                return self.shown[rest[0]]
            case "mine":
                return Remote(self, rest[0])
        return CONTAINERS[kind](map(self.decoded, rest))


def asks(what: str) -> Callable[..., Any]:
    def method(self: Remote, *args: Any, **named: Any) -> Any:
        return object.__getattribute__(self, "line").ask(what, self, args, named)

    return method


def asks_of_both(what: str) -> Callable[[Remote, object], Any]:
    def method(self: Remote, other: object) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented
        return asks(what)(self, other)

    return method


class Remote:
    """Something that lives in the other process."""

    def __init__(self, line: Line, place: int) -> None:
        object.__setattr__(self, "line", line)
        object.__setattr__(self, "place", place)

    __call__ = asks("call")
    __getattr__ = asks("getattr")
    __setattr__ = asks("setattr")
    __getitem__ = asks("getitem")
    __setitem__ = asks("setitem")
    __len__ = asks("len")
    __iter__ = asks("iter")
    __next__ = asks("next")
    __bool__ = asks("bool")
    __hash__ = asks("hash")
    __str__ = asks("str")
    __repr__ = asks("repr")
    __eq__ = asks_of_both("eq")
    __lt__ = asks_of_both("lt")
    __add__ = asks_of_both("add")
    __sub__ = asks_of_both("sub")
    __mul__ = asks_of_both("mul")
    __instancecheck__ = asks_of_both("instancecheck")


def names_of(kind: type[Exception]) -> list[str]:
    """What the next builtin exception is called, and itself."""
    base = next(k.__name__ for k in kind.__mro__ if vars(builtins).get(k.__name__) is k)
    return [base, kind.__name__]


def take_over(before: object, now: object) -> None:
    """What a call made of an argument."""
    if isinstance(before, list) and isinstance(now, list):
        before[:] = now
    elif (isinstance(before, dict) and isinstance(now, dict)) or (
        isinstance(before, set) and isinstance(now, set)
    ):
        before.clear()
        before.update(now)
