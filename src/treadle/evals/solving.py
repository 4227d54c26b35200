"""Accuracy on verifiable problems: the model solves held-out ones, their verifier judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.data.problems import Problems
from treadle.evals.generative import ChatPrompt, Generative, OpenItem, Prompting
from treadle.inference.sampling import Sampling


class Solving(Generative):
    """The share of problems solved, in all and by verifier."""

    name: str = "solving"
    problems: Problems
    limit: int = 100
    prompting: Prompting = ChatPrompt()
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=160)

    def items(self) -> Sequence[OpenItem]:
        problems = [self.problems.problem(index) for index in range(self.limit)]
        return [
            OpenItem(index, problem.verifier, problem.prompt[-1].content, problem.answer)
            for index, problem in enumerate(problems)
        ]

    def marks(self, item: OpenItem, text: str) -> Mapping[str, float]:
        problem = self.problems.problem(item.index)
        return {"solved": float(self.problems.score(problem, text) >= 1.0)}
