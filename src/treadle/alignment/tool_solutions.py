"""Worked plays of problems with tools: calls, their results, the answer."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from treadle.alignment.search import SearchTool
from treadle.alignment.tools import Calculator, CallableTool, WithTools, call_text
from treadle.core.errors import TreadleError
from treadle.data.records import Chat, assistant, user
from treadle.data.supervised import Conversations


class CalculatorSolutions(Conversations):
    """Problems whose metadata hold an `expression`, such as those of the family `chain_sum`."""

    environment: WithTools
    amount: int = Field(512, ge=1)

    def conversation(self, index: int) -> Chat:
        """The play in which the model lets the calculator do all of it.

        Raises:
            TreadleError: the problem has no expression, or its tools are without a calculator.
        """
        told = self.environment.problems.problem(index).metadata
        if "expression" not in told:
            raise TreadleError(
                "CalculatorSolutions: these problems tell no expression; take the family chain_sum"
            )
        tool = tool_of(self.environment, Calculator)
        return worked_play(
            self.environment, index, [call_text(tool.name(), expression=str(told["expression"]))]
        )

    def count(self) -> int | None:
        return self.amount


class SearchSolutions(Conversations):
    """Problems whose metadata hold `queries`, such as `LookUps`."""

    environment: WithTools
    amount: int = Field(512, ge=1)

    def conversation(self, index: int) -> Chat:
        """The play in which the model looks up one thing after another.

        Raises:
            TreadleError: the problem has no queries, or its tools are without a search.
        """
        told = self.environment.problems.problem(index).metadata
        if "queries" not in told:
            raise TreadleError("SearchSolutions: these problems tell no queries; take LookUps")
        tool = tool_of(self.environment, SearchTool)
        calls = [call_text(tool.name(), query=query) for query in told["queries"]]
        return worked_play(self.environment, index, calls)

    def count(self) -> int | None:
        return self.amount


def tool_of(environment: WithTools, kind: type[CallableTool]) -> CallableTool:
    """The tool of a kind. Raises TreadleError where there is none."""
    for tool in environment.tools:
        if isinstance(tool, kind):
            return tool
    raise TreadleError(f"the environment has no {kind.__name__}; add one to `tools`")


def worked_play(environment: WithTools, index: int, calls: Sequence[str]) -> Chat:
    """The problem, each call with what came of it, and the right answer."""
    problem, play = environment.problems.problem(index), environment.begin(index)
    turns = list(environment.put(problem).prompt)
    for call in calls:
        turns += [assistant(call), user(play.hear(0, call).told[0])]
    return Chat((*turns, assistant(f"Answer: {problem.answer}")))
