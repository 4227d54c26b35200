"""A Jinja sandbox for chat templates, with a budget of loop steps, seconds and characters.

Jinja's own sandbox keeps a template from the interpreter; it does not keep it from looping for
years or filling the memory. Here every loop iteration, macro call, `~`, `+`, `*` and filter is
counted or bounded. The functions are those that Hugging Face templates use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

OPEN, CLOSE = "\ufdd0assistant\ufdd1", "\ufdd1assistant\ufdd0"
"""What surrounds text of `{% generation %}` blocks; noncharacters, which no text holds."""
BUDGET = "render budget"
"""The context key of the budget: not an identifier, so that no template can name it."""


@dataclass(frozen=True)
class Limits:
    """How much one rendering may use."""

    steps: int = 1_000_000
    """Loop iterations and macro calls."""
    seconds: float = 10.0
    characters: int = 16_000_000
    """Of the output, and of any one string."""


class RunawayError(TemplateError):
    """The template used up its budget."""


class Budget:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.steps = limits.steps
        self.deadline = monotonic() + limits.seconds

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise RunawayError(f"takes more than {self.limits.steps} loop steps")
        if monotonic() > self.deadline:
            raise RunawayError(f"runs longer than {self.limits.seconds} s")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return OPEN + caller() + CLOSE


class _Metered(NodeTransformer):
    """Count every loop iteration and macro call, and every `~`, against the budget."""

    def _count(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(
            nodes.EnvironmentAttribute("step"), [nodes.ContextReference()], [], None, None
        )
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return node

    visit_For = _count  # noqa: N815
    visit_Macro = _count  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        items = [nodes.ContextReference(), *node.nodes]
        join = nodes.EnvironmentAttribute("join")
        return nodes.Call(join, items, [], None, None).set_lineno(node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters = {name: _bounded(name, f) for name, f in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["namespace"] = _PlainNamespace
        self.globals.pop("lipsum")

    def step(self, context: Context) -> None:
        context.parent[BUDGET].step()

    def join(self, context: Context, *items: Any) -> str:
        parts = [str(item) for item in items]
        _check_size(context, sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case ("+", str() | list(), str() | list()):
                _check_size(context, len(left) + len(right))
            case ("*", str() | list(), int()):
                _check_size(context, len(left) * right)
            case ("*", int(), str() | list()):
                _check_size(context, left * len(right))
            case ("*", int(), int()):
                _check_size(context, left.bit_length() + right.bit_length())
            case ("**", _, int()):
                _check_size(context, right)
            case ("%", str(), _):
                _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _check_size(__context, value)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered().visit(source), *args, **kwargs)


class _PlainNamespace(Namespace):
    """A namespace whose attributes cannot reach into the interpreter."""

    def __init__(self, *mappings: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*mappings, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"namespace attribute `{name}` must not begin with `_`")
        super().__setitem__(name, value)


def _check_size(context: Context, size: int) -> None:
    limit = context.parent[BUDGET].limits.characters
    if size > limit:
        raise RunawayError(f"makes a value of {size} characters, more than {limit}")


def _check_format(text: str) -> None:
    if re.search(r"%[^a-zA-Z%]*(\*|\d{5})|\{[^}]*:[^}]*\d{5}", text):
        raise RunawayError("formats to a width of more than 9999")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no huge widths or counts."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, int) and value > 9999:
                raise RunawayError(f"gives {value} to the filter `{name}`")
        if name == "format":
            _check_format(str(args[0]))
        return function(*args, **kwargs)

    return checked


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_at(moment: datetime) -> Callable[[str], str]:
    """The template function `strftime_now`, which tells `moment`."""

    def strftime_now(layout: str) -> str:
        _check_format(layout)
        return moment.strftime(layout)

    return strftime_now


def _refuse(message: str) -> None:
    raise TemplateError(message)
