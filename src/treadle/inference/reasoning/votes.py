"""Self-consistency and best-of-N: many answers to one question, of which one is taken.

    majority    argmax_a  #{i : a_i = a}
    weighted    argmax_a  sum_{i : a_i = a} exp(mean_t log p_t)          Wang et al. 2022
    best of N   argmax_i  score(text_i)

The first answer found wins a tie.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.rating import Rating
from treadle.inference.reasoning.prompting import Prompt, ZeroShot, prompted
from treadle.inference.reasoning.strategy import Ask, Strategy, Thinker, Thought, Turns, visible
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

CARDS = (
    Card(
        id="re.self_consistency",
        paper="Wang et al. 2022, arXiv:2203.11171",
        summary="Many sampled paths, and a majority or weighted vote over their answers.",
        recipe="treadle reason smollm2-135m-instruct --strategy '{kind: SelfConsistency, n: 8}'",
        oracle="tests/inference/test_inference_reasoning.py::test_votes_against_counting",
    ),
    Card(
        id="re.best_of_n",
        paper="Cobbe et al. 2021, arXiv:2110.14168",
        summary="The best of N answers by a verifier, a reward model, or how sure the model is.",
        recipe="treadle reason smollm2-135m-instruct --strategy '{kind: BestOfN, n: 8}'",
        oracle="tests/inference/test_inference_reasoning.py::test_best_of_n_has_the_closed_form_rate",
    ),
)
VARIED = Sampling(temperature=0.7, max_tokens=192)


class Vote(Config):
    """A shape: how much an answer's voice counts."""

    @abstractmethod
    def __call__(self, completion: Completion) -> float:
        """The weight of one path."""


class Majority(Vote):
    """Every path has one voice."""

    def __call__(self, completion: Completion) -> float:
        return 1.0


class ByLikelihood(Vote):
    """The path's probability, length-normalised."""

    def __call__(self, completion: Completion) -> float:
        if not completion.logprobs:
            return 0.0
        return math.exp(math.fsum(completion.logprobs) / len(completion.logprobs))


class SelfConsistency(Strategy):
    """The answer that most paths come to."""

    n: int = Field(8, ge=1)
    prompt: Prompt = ZeroShot()
    sampling: Sampling = VARIED
    vote: Vote = Majority()

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        asks = prompted(self.prompt, questions)
        thoughts = []
        for ask, paths in zip(asks, thinker.ask(asks, self.sampling, self.n), strict=True):
            answers = [thinker.extract(visible(ask.prefix + path.text)) for path in paths]
            winner = elect(answers, [self.vote(path) for path in paths])
            texts = [ask.prefix + path.text for path in paths]
            thoughts.append(thinker.thought(ask.question, texts[winner], texts))
        return thoughts


def elect(answers: Sequence[str | None], weights: Sequence[float]) -> int:
    """Index of the first path to the answer with most weight; paths without an answer abstain."""
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    if not totals:
        return 0
    return answers.index(max(totals, key=lambda a: totals[a]))


class Preferred(Config):
    """A shape: which of several texts is best."""

    @abstractmethod
    def __call__(
        self, thinker: Thinker, ask: Ask, texts: Sequence[str], paths: Sequence[Completion]
    ) -> list[float]:
        """A score for each text that answers `ask`."""


class BySureness(Preferred):
    """Mean log-probability of a token; texts without an answer come last."""

    def __call__(
        self, thinker: Thinker, ask: Ask, texts: Sequence[str], paths: Sequence[Completion]
    ) -> list[float]:
        vote = ByLikelihood()
        return [
            vote(path) if thinker.extract(visible(text)) is not None else -1.0
            for text, path in zip(texts, paths, strict=True)
        ]


class ByVerifier(Preferred):
    """What the problems' verifier gives: the rate at which N samples hold a right one (pass@N)."""

    def __call__(
        self, thinker: Thinker, ask: Ask, texts: Sequence[str], paths: Sequence[Completion]
    ) -> list[float]:
        if thinker.verify is None:
            raise TreadleError(
                "ByVerifier: these questions have no verifier: choose BySureness, or problems "
                "that can be checked"
            )
        return [thinker.verify(ask.question, visible(text)) for text in texts]


class ByReward(Preferred):
    """What a reward model gives, or any other reward."""

    reward: Rating

    def __call__(
        self, thinker: Thinker, ask: Ask, texts: Sequence[str], paths: Sequence[Completion]
    ) -> list[float]:
        if thinker.rate is None:
            raise TreadleError(
                "ByReward: these questions are no problems that a reward could read: choose "
                "BySureness"
            )
        return thinker.rate(self.reward, ask.question, [visible(text) for text in texts])


class BestOfN(Strategy):
    """The best of N answers."""

    n: int = Field(8, ge=1)
    prompt: Prompt = ZeroShot()
    sampling: Sampling = VARIED
    by: Preferred = BySureness()

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        asks = prompted(self.prompt, questions)
        thoughts = []
        for ask, paths in zip(asks, thinker.ask(asks, self.sampling, self.n), strict=True):
            texts = [ask.prefix + path.text for path in paths]
            scores = self.by(thinker, ask, texts, paths)
            best = max(range(self.n), key=lambda i: (scores[i], -i))
            thoughts.append(thinker.thought(ask.question, texts[best], texts))
        return thoughts
