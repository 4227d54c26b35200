"""Worked solutions to learn from: small programs write each step, the verifier checks the answer.

A model that sees the steps of a few hundred problems learns the way to the answer, where the bare
answers would teach it little (Wei et al. 2022, arXiv:2201.11903). No larger model is needed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

from pydantic import Field

from treadle.alignment import worked
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.verifiers import marks
from treadle.core.errors import TreadleError, did_you_mean
from treadle.data.records import Chat, Problem, assistant
from treadle.data.supervised import Conversations


def worked_solution(problem: Problem) -> str:
    """Steps, and the answer after `Answer:`.

    Raises:
        TreadleError: nobody wrote solutions for the problem's family.
    """
    family = problem.verifier.rpartition("/")[2]
    module = f"{worked.__name__}.{family}"
    if find_spec(module) is None:
        known = [found.name for found in iter_modules(worked.__path__)]
        raise TreadleError(
            f"no worked solutions for the family `{family}`{did_you_mean(family, known)}"
        )
    steps: list[str] = import_module(module).steps(problem.metadata)
    text = "\n".join([*steps, f"Answer: {problem.answer}"])
    assert marks(problem, text) >= 1.0, f"the verifier of {family} rejects:\n{text}"
    return text


class WorkedSolutions(Conversations):
    """Problems with their solutions, as conversations to learn from."""

    problems: ReasoningGym
    amount: int = Field(1000, ge=1)
    """How many problems, from number 0."""

    def conversation(self, index: int) -> Chat:
        problem = self.problems.problem(index)
        return Chat((*problem.prompt, assistant(worked_solution(problem))))

    def count(self) -> int | None:
        return self.amount
