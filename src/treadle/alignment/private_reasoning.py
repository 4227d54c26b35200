"""Learning to think before answering, in private: worked solutions whose steps stand in tags.

    <think>
    17 + 25 = 42
    </think>
    Answer: 42

The user sees what follows the tags (`inference/reasoning/strategy.py`: `visible`). Wei et al. 2022,
arXiv:2201.11903 (chain of thought); DeepSeek-R1, arXiv:2501.12948 (the format).
"""

from __future__ import annotations

from dataclasses import replace

from treadle.alignment.rewards import Reward, Verified
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.records import Chat, Problem
from treadle.data.supervised import Conversations
from treadle.inference.reasoning.strategy import END_THINK, THINK, visible

CARD = Card(
    id="re.train",
    paper="Wei et al. 2022, arXiv:2201.11903; DeepSeek-R1, arXiv:2501.12948",
    summary="Chain-of-thought training with the reasoning in a private channel before the answer.",
    recipe="treadle run quickstart steps.1.source.conversations='{kind: ThinkFirst, of: "
    "{kind: WorkedSolutions, problems: {kind: ReasoningGym, families: "
    "[{kind: Family, name: gcd}]}}}'",
    oracle="tests/alignment/test_alignment_private_reasoning.py::test_a_trained_model_thinks_in_private",
)
MARK = "Answer:"


class ThinkFirst(Conversations):
    """Conversations whose last turn keeps what precedes its `Answer:` to itself."""

    of: Conversations

    def conversation(self, index: int) -> Chat:
        """Raises TreadleError where the last turn has no `Answer:` on a line of its own."""
        chat = self.of.conversation(index)
        last = chat.messages[-1]
        steps, found, answer = last.content.rpartition(f"\n{MARK}")
        if not found and not last.content.startswith(MARK):
            raise TreadleError(f"conversation {index}: its last turn has no line with `{MARK}`")
        if not found:
            steps, answer = "", last.content.removeprefix(MARK)
        text = f"{THINK}\n{steps.strip()}\n{END_THINK}\n{MARK}{answer}"
        return replace(chat, messages=(*chat.messages[:-1], replace(last, content=text)))

    def count(self) -> int | None:
        return self.of.count()


class OfVisible(Reward):
    """A reward of what the user sees: an answer that stayed private earns nothing."""

    of: Reward = Verified()

    def __call__(self, problem: Problem, completion: str) -> float:
        return self.of(problem, visible(completion))
