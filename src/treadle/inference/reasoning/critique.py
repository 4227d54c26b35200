"""Critique and refine: the model looks for its own mistakes and writes the answer again.

Madaan et al. 2023 (Self-Refine, arXiv:2303.17651).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from treadle.core.cards import Card
from treadle.inference.reasoning.prompting import GREEDY, Prompt, ZeroShot, prompted
from treadle.inference.reasoning.strategy import Ask, Strategy, Thinker, Thought, Turns, visible
from treadle.inference.sampling import Sampling

CARD = Card(
    id="re.critique",
    paper="Madaan et al. 2023, Self-Refine, arXiv:2303.17651",
    summary="The model criticises its answer and refines it, until it finds nothing or rounds end.",
    recipe="treadle reason smollm2-135m-instruct --strategy OneAnswer --strategy CritiqueAndRefine",
    oracle="tests/inference/test_inference_reasoning.py::test_refinement_talks_as_in_the_paper",
)


class CritiqueAndRefine(Strategy):
    """Answer, critique, answer again."""

    rounds: int = Field(1, ge=1)
    prompt: Prompt = ZeroShot()
    sampling: Sampling = GREEDY
    critique: str = (
        "Check your solution step by step. Name the first mistake, or say 'No mistakes.'"
    )
    refine: str = "Now write the whole solution again without the mistakes."
    content: str = "no mistakes"
    """A critique that says these words, in any case, ends the rounds."""

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        asks = prompted(self.prompt, questions)
        texts = [
            a.prefix + c.text
            for a, (c,) in zip(asks, thinker.ask(asks, self.sampling), strict=True)
        ]
        traces: list[list[str]] = [[text] for text in texts]
        going = list(range(len(asks)))
        for _ in range(self.rounds):
            talks = [self._talk(asks[i].turns, texts[i], self.critique) for i in going]
            found = thinker.ask(
                [Ask(i, t) for i, t in zip(going, talks, strict=True)], self.sampling
            )
            open_: list[tuple[int, Turns]] = []
            for i, talk, (critique,) in zip(going, talks, found, strict=True):
                traces[i].append(critique.text)
                said = visible(critique.text).strip()
                if said and self.content not in said.lower():
                    open_.append((i, self._talk(talk, said, self.refine)))
            again = thinker.ask([Ask(i, talk) for i, talk in open_], self.sampling)
            going = []
            for (i, _), (better,) in zip(open_, again, strict=True):
                # A refinement that lost the answer is no refinement.
                if thinker.extract(visible(better.text)) is not None:
                    texts[i] = better.text
                    going.append(i)
                traces[i].append(better.text)
        return [thinker.thought(i, text, traces[i]) for i, text in enumerate(texts)]

    def _talk(self, turns: Turns, said: str, then: str) -> Turns:
        """The conversation with the model's words and the next request."""
        words = {"role": "assistant", "content": visible(said)}
        return (*turns, words, {"role": "user", "content": then})
