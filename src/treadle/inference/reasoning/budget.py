"""Thinking budgets: reasoning in private up to so many tokens, then the answer is asked for.

The model writes between `<think>` tags. At the budget's end the tag is closed for it and the
answer begins; where it stops too early, its wish is overruled and it goes on from "Wait"
(Muennighoff et al. 2025, s1, arXiv:2501.19393).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from treadle.core.cards import Card
from treadle.inference.reasoning.strategy import (
    END_THINK,
    THINK,
    Ask,
    Strategy,
    Thinker,
    Thought,
    Turns,
)
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

CARD = Card(
    id="re.budget",
    paper="Muennighoff et al. 2025, s1, arXiv:2501.19393",
    summary="Private thinking within a least and a most number of tokens, then a short answer.",
    recipe="treadle reason smollm2-135m-instruct --strategy '{kind: ThinkingBudget, most: 96}'",
    oracle="tests/inference/test_inference_reasoning.py::test_tokens_obey_the_budget",
)


class ThinkingBudget(Strategy):
    """Think at most `most` tokens and at least `least`, then answer in `answer` tokens."""

    most: int = Field(128, ge=1)
    least: int = Field(0, ge=0)
    answer: int = Field(32, ge=1)
    cue: str = "Answer:"
    """How the visible answer begins."""
    more: str = "\nWait"
    """What makes a model that stopped go on."""
    sampling: Sampling = Sampling(temperature=0.0)

    @model_validator(mode="after")
    def _bounds(self) -> ThinkingBudget:
        if self.least > self.most:
            raise ValueError(f"least={self.least} is more than most={self.most}")
        return self

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        thoughts = [""] * len(questions)
        used = [0] * len(questions)
        going = list(range(len(questions)))
        while going:
            # Engine batches share a limit, so those with equal room go together.
            room = self.most - used[going[0]]
            now = [i for i in going if self.most - used[i] == room]
            going = [i for i in going if i not in now]
            asks = [Ask(i, questions[i], f"{THINK}\n{thoughts[i]}") for i in now]
            sampling = self.sampling.replace(max_tokens=room, stop=(*self.sampling.stop, END_THINK))
            for i, (part,) in zip(now, thinker.ask(asks, sampling), strict=True):
                thoughts[i] += part.text
                used[i] += _tokens(part)
                if part.tokens and part.finish == "stop" and used[i] < self.least:
                    thoughts[i] += self.more
                    going.append(i)
        prefixes = [f"{THINK}\n{t.strip()}\n{END_THINK}\n{self.cue}" for t in thoughts]
        asks = [Ask(i, q, p) for i, (q, p) in enumerate(zip(questions, prefixes, strict=True))]
        answers = thinker.ask(asks, self.sampling.replace(max_tokens=self.answer))
        return [thinker.thought(i, prefixes[i] + c.text) for i, (c,) in enumerate(answers)]


def _tokens(part: Completion) -> int:
    """Of a completion that may have said nothing: it counts as one, so that rounds end."""
    return max(1, len(part.tokens))
