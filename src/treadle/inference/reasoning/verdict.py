"""Best-of-N by the model's own word: how likely it is to call an answer right.

    score(y) = P(yes) / (P(yes) + P(no)),    P(. | question, y, "Is this solution right?")

Kadavath et al. 2022, P(True), arXiv:2207.05221. A model learns to answer the question by
`alignment/reviewed.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.inference.reasoning.strategy import Ask, Thinker, Turns, visible
from treadle.inference.reasoning.votes import Preferred
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

CARD = Card(
    id="re.best_of_n.verdict",
    paper="Kadavath et al. 2022, Language Models (Mostly) Know What They Know, arXiv:2207.05221",
    summary="The best of N answers by how likely the model is to call it right.",
    recipe="treadle reason smollm2-135m-instruct "
    "--strategy '{kind: BestOfN, n: 4, by: {kind: ByVerdict}}'",
    oracle="tests/inference/test_inference_verdict.py::test_the_score_is_the_probability_of_yes",
)
ASK = "Is this solution right? Answer Yes or No."
YES, NO = "Yes.", "No."
FAVOUR = 100.0
"""Added to the scores of both words, so that they are the likeliest; it leaves their odds."""


class ByVerdict(Preferred):
    """How likely the model is to call a text right rather than wrong."""

    ask: str = ASK

    def __call__(
        self, thinker: Thinker, ask: Ask, texts: Sequence[str], paths: Sequence[Completion]
    ) -> list[float]:
        """Raises TreadleError where both words begin with the same token."""
        asks = [Ask(ask.question, self._talk(ask.turns, text)) for text in texts]
        encode = thinker.engine.tokenizer.encode
        yes, no = (encode(word, parse_special=False)[0] for word in (YES, NO))
        if yes == no:
            raise TreadleError(
                f"ByVerdict: the tokenizer begins `{YES}` and `{NO}` alike: choose BySureness"
            )
        bias = ((yes, FAVOUR), (no, FAVOUR))
        sampling = Sampling(temperature=0.0, max_tokens=1, top_logprobs=2, logit_bias=bias)
        scores = []
        for (said,) in thinker.ask(asks, sampling):
            if not said.top_logprobs:  # no room for a verdict in the context
                scores.append(0.0)
                continue
            found = dict(said.top_logprobs[0])
            scores.append(1 / (1 + math.exp(found[no] - found[yes])))
        return scores

    def _talk(self, turns: Turns, text: str) -> Turns:
        said = {"role": "assistant", "content": visible(text)}
        return (*turns, said, {"role": "user", "content": self.ask})
