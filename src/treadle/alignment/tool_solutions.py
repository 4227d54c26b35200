"""Worked plays of sums with a calculator: a call, its result, the answer."""

from __future__ import annotations

from pydantic import Field

from treadle.alignment.tools import Calculator, WithTools, call_text
from treadle.core.errors import TreadleError
from treadle.data.records import Chat, assistant, user
from treadle.data.supervised import Conversations


class CalculatorSolutions(Conversations):
    """Problems whose metadata hold an expression, such as those of the family `chain_sum`."""

    environment: WithTools
    amount: int = Field(512, ge=1)

    def conversation(self, index: int) -> Chat:
        """The play in which the model lets the calculator do all of it.

        Raises:
            TreadleError: the problem has no expression, or its tools are without a calculator.
        """
        environment = self.environment
        problem = environment.problems.problem(index)
        if "expression" not in problem.metadata:
            raise TreadleError(
                f"CalculatorSolutions: problems of `{problem.verifier}` tell no expression; take "
                "the family chain_sum"
            )
        if not any(isinstance(tool, Calculator) for tool in environment.tools):
            raise TreadleError("CalculatorSolutions: the environment has no Calculator; add one")
        call = call_text(Calculator().name(), expression=str(problem.metadata["expression"]))
        heard = environment.begin(index).hear(0, call)
        return Chat(
            (
                *environment.put(problem).prompt,
                assistant(call),
                user(heard.told[0]),
                assistant(f"Answer: {problem.answer}"),
            )
        )

    def count(self) -> int | None:
        return self.amount
