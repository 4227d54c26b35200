"""Worked plays of problems with tools: calls, their results, the answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from treadle.alignment.search import SearchTool
from treadle.alignment.tools import Calculator, CallableTool, WithTools, call_text
from treadle.core.errors import TreadleError
from treadle.data.records import Chat, assistant, user
from treadle.data.supervised import Conversations


class WorkedPlays(Conversations):
    """A shape: problems on which a program knows which calls to make."""

    environment: WithTools
    amount: int = Field(512, ge=1)

    @abstractmethod
    def calls(self, told: Mapping[str, Any]) -> list[str]:
        """For a problem with these metadata.

        Raises:
            TreadleError: they do not say enough, or the tool is not among the environment's.
        """

    def conversation(self, index: int) -> Chat:
        """The problem, each call with what came of it, and the right answer."""
        environment = self.environment
        problem, play = environment.problems.problem(index), environment.begin(index)
        turns = list(environment.put(problem).prompt)
        for call in self.calls(problem.metadata):
            turns += [assistant(call), user(play.hear(0, call).told[0])]
        return Chat((*turns, assistant(f"Answer: {problem.answer}")))

    def count(self) -> int | None:
        return self.amount

    def told(self, metadata: Mapping[str, Any], key: str, remedy: str) -> Any:
        if key not in metadata:
            raise TreadleError(f"{type(self).__name__}: these problems tell no {key}; {remedy}")
        return metadata[key]


class CalculatorSolutions(WorkedPlays):
    """The calculator does all of it, where problems tell their `expression`."""

    def calls(self, told: Mapping[str, Any]) -> list[str]:
        expression = self.told(told, "expression", "take the family chain_sum")
        name = tool_of(self.environment, Calculator).name()
        return [call_text(name, expression=str(expression))]


class SearchSolutions(WorkedPlays):
    """One thing after another is looked up, where problems tell their `queries`."""

    def calls(self, told: Mapping[str, Any]) -> list[str]:
        queries = self.told(told, "queries", "take LookUps")
        name = tool_of(self.environment, SearchTool).name()
        return [call_text(name, query=query) for query in queries]


def tool_of(environment: WithTools, kind: type[CallableTool]) -> CallableTool:
    """The tool of a kind. Raises TreadleError where there is none."""
    for tool in environment.tools:
        if isinstance(tool, kind):
            return tool
    raise TreadleError(f"the environment has no {kind.__name__}; add one to `tools`")
