"""Tools: the model asks for a calculation in the middle of its work and goes on with the result.

    <tool_call>{"name": "calculator", "arguments": {"expression": "37 * 41"}}</tool_call>

A turn that holds calls is answered with their results; one that holds none is the answer, and a
verifier scores it. A tool that raises, hangs or is not there says so to the model, which may try
again; it is counted, and the run's log names it. Schick et al. 2023, Toolformer, arXiv:2302.04761;
Jin et al. 2025, Search-R1, arXiv:2503.09516 (reinforcement with what tools say masked).
"""

from __future__ import annotations

import ast
import json
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from treadle.alignment.episodes import Environment, Heard, Play
from treadle.alignment.sandbox import run_python
from treadle.alignment.verify.tool_calls import tool_calls
from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError, did_you_mean
from treadle.data.problems import Problems
from treadle.data.rating import OvertimeError
from treadle.data.records import Messages, Problem

CARD = Card(
    id="al.tools",
    paper="Schick et al. 2023, Toolformer, arXiv:2302.04761; Jin et al. 2025, arXiv:2503.09516",
    summary="Reinforcement with a calculator, a Python sandbox and other tools over several turns.",
    recipe="treadle run tools",
    oracle="tests/alignment/test_alignment_tools.py::test_the_loss_is_that_of_own_tokens_alone",
)
CALL = "<tool_call>"
LONGEST = 400
"""Characters of a result that the model sees."""
OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class CallableTool(Config):
    """A shape: something that a model may call by name with arguments."""

    @abstractmethod
    def name(self) -> str:
        """As calls have it."""

    @abstractmethod
    def describe(self) -> str:
        """What the model is told of it: its arguments and what it gives."""

    @abstractmethod
    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The result; any exception is told to the model and counted."""

    def prepare(self) -> None:
        """What takes long and is done once, before a play begins: no patience ends it."""
        return


class Calculator(CallableTool):
    """The four operations, remainders and brackets, on numbers."""

    def name(self) -> str:
        return "calculator"

    def describe(self) -> str:
        return 'calculator(expression): the value of an expression such as "3 * (4 + 5)"'

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        value = calculate(str(arguments["expression"]))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value)


class PythonTool(CallableTool):
    """A program in the sandbox: no network, little time and memory."""

    seconds: float = Field(2.0, gt=0.0)
    megabytes: int = Field(256, ge=16)

    def name(self) -> str:
        return "python"

    def describe(self) -> str:
        return "python(code): what a Python program prints"

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        outcome = run_python(str(arguments["code"]), seconds=self.seconds, megabytes=self.megabytes)
        if outcome.timed_out:
            raise TimeoutError(f"no end within {self.seconds:g} s")
        if outcome.code:
            last = outcome.stderr.strip().splitlines()[-1:]
            raise RuntimeError(last[0] if last else f"status {outcome.code}")
        return outcome.stdout.strip()


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression.

    Raises:
        ValueError: it is none; ZeroDivisionError.
    """
    if len(expression) > LONGEST:
        raise ValueError("the expression is too long")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"`{expression}` is no expression") from None


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            found: int | float = OPERATIONS[type(op)](_value(left), _value(right))
            return found
    raise ValueError("only numbers, + - * / // % and brackets are known")


class WithTools(Environment):
    """Problems that a model may work on with tools."""

    problems: Problems
    tools: tuple[CallableTool, ...] = Field(min_length=1)
    calls: int = Field(4, ge=1)
    """Turns with calls that are answered; the next one is taken for the answer."""
    told: bool = True
    """Whether the prompt says which tools there are and how they are called."""

    @model_validator(mode="after")
    def _names_differ(self) -> WithTools:
        names = [tool.name() for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError(f"two tools have one name in {names}: leave one out")
        return self

    def openings(self, index: int) -> tuple[Messages, ...]:
        return (self.put(self.problems.problem(index)).prompt,)

    def begin(self, index: int) -> Play:
        return ToolPlay(self, self.problems.problem(index))

    def put(self, problem: Problem) -> Problem:
        """The problem with what the model is told of its tools."""
        if not self.told:
            return problem
        last = problem.prompt[-1]
        text = f"{last.content}\n{manual(self.tools)}"
        return replace(problem, prompt=(*problem.prompt[:-1], replace(last, content=text)))


def manual(tools: Sequence[CallableTool]) -> str:
    """What a prompt says of tools."""
    lines = [f"- {tool.describe()}" for tool in tools]
    form = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    return "\n".join([f"You may call tools with {form}:", *lines])


class ToolPlay(Play):
    """One problem and the calls made for it."""

    def __init__(self, config: WithTools, problem: Problem) -> None:
        self.config, self.problem = config, problem
        self.tools = {tool.name(): tool for tool in config.tools}
        for tool in config.tools:
            tool.prepare()
        self.answered = 0

    def hear(self, seat: int, said: str) -> Heard:
        if CALL not in said or self.answered == self.config.calls:
            return Heard(None, rewards=(self.config.problems.score(self.problem, said),))
        self.answered += 1
        try:
            calls = tool_calls(said)
        except ValueError as error:
            return _answered([f"error: {error}"], f"a call is malformed: {error}")
        results, failure = [], ""
        for call in calls:
            try:
                results.append(self._call(call)[:LONGEST])
            except TreadleError:
                raise
            except (Exception, OvertimeError) as error:  # a tool may fail in any way
                told = f"{type(error).__name__}: {error}"[:LONGEST]
                results.append(f"error: {told}")
                failure = f"tool `{call['name']}`: {told}"
                if isinstance(error, OvertimeError):
                    break  # nobody would interrupt the next one
        return _answered(results, failure)

    def _call(self, call: Mapping[str, Any]) -> str:
        name = str(call["name"])
        if name not in self.tools:
            raise LookupError(f"there is no tool `{name}`{did_you_mean(name, self.tools)}")
        return self.tools[name](call["arguments"])


def _answered(results: Sequence[str], failure: str) -> Heard:
    lines = [f"<tool_response>{result}</tool_response>" for result in results]
    return Heard(0, told={0: "\n".join(lines)}, failure=failure)


def call_text(name: str, **arguments: str) -> str:
    """A call as the model is to write it."""
    return f"{CALL}{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
