"""Accuracy on verifiable problems: the model solves held-out ones, the verifier judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.verifiers import extract_answer, marks
from treadle.evals.generative import Chat, Generative, OpenItem, Prompting
from treadle.inference.sampling import Sampling


class Solving(Generative):
    """Problems answered in the chat format; the share with full marks, in all and by family."""

    name: str = "solving"
    problems: ReasoningGym
    limit: int = 100
    prompting: Prompting = Chat()
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=160)

    def items(self) -> Sequence[OpenItem]:
        items = []
        for index in range(self.limit):
            problem = self.problems.problem(index)
            family = problem.verifier.rpartition("/")[2]
            items.append(OpenItem(index, family, problem.prompt[-1].content, problem.answer))
        return items

    def marks(self, item: OpenItem, text: str) -> Mapping[str, float]:
        problem = self.problems.problem(item.index)
        return {
            "solved": float(marks(problem, text) >= 1.0),
            "answered": float(extract_answer(text) is not None),
        }
