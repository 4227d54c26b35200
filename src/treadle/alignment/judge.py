"""Feedback from a model that is asked in both orders, so that an answer's place cannot win.

    l_12 = log p(A) - log p(B), the first answer shown as A;     l_21, the second shown as A
    d = (l_12 - l_21) / 2        how much better the first is
    b = (l_12 + l_21) / 2        what being shown as A is worth: the position bias
    P(first better) = sigmoid(d / T),     reported bias b / T

If l = +-d + b, as in the model of Bradley and Terry with an advantage of place, d is free of b
whatever b is. Lee et al. 2023, RLAIF, arXiv:2309.00267; Zheng et al. 2023, arXiv:2306.05685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from treadle.alignment.feedback import Comparison, Labeller, Verdict, asked
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.batch import within_budget
from treadle.data.problems import Problems
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Pretrained
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.tokenizers.chat import encode_prompt
from treadle.tokenizers.load import tokenizer_of
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="al.rlaif",
    paper="Lee et al. 2023, RLAIF, arXiv:2309.00267; Zheng et al. 2023, arXiv:2306.05685",
    summary="A model judges two answers in both orders; the bias of place is measured and removed.",
    recipe="treadle run rlaif steps.agreement.pairs.path=pairs.jsonl",
    oracle="tests/alignment/test_alignment_judge.py::test_the_bias_of_place_cancels",
)
QUESTION = """\
{principle}

Question:
{question}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Say A or B."""


class ByJudge(Labeller):
    """A language model, asked which of A and B is better."""

    model: ModelSource = Pretrained(name="smollm2-135m-instruct")
    principle: str = "Choose the answer that is more correct, helpful and harmless."
    temperature: float = Field(1.0, gt=0.0)
    """T: above 1 the judge is trusted less."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a pass."""
    precision: Precision = Auto()

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        return self.by_principles(comparisons, [self.principle] * len(comparisons), workspace)

    def by_principles(
        self, comparisons: Sequence[Comparison], principles: Sequence[str], workspace: Workspace
    ) -> list[Verdict]:
        """Verdicts, each by a principle of its own; a question that does not fit the judge's
        context has none."""
        opened, precision = self.model.open(workspace), self.precision.resolve("cpu")
        model, tokenizer = opened.model.eval(), tokenizer_of(opened)
        precision.prepare(model)
        prompts = [
            encode_prompt(tokenizer, [{"role": "user", "content": question(principle, c, *pair)}])
            for c, principle in zip(comparisons, principles, strict=True)
            for pair in ((c.first, c.second), (c.second, c.first))
        ]
        context = model.config.context
        long = {i // 2 for i, p in enumerate(prompts) if len(p) > context}
        fitting = [p for i, p in enumerate(prompts) if i // 2 not in long]
        with (
            precision.autocast("cpu"),
            workspace.progress.task("verdicts", len(fitting) // 2) as task,
        ):
            odds = preference_odds(
                model, tokenizer, fitting, self.tokens, lambda done: task.update(done // 2)
            )
        told = iter(zip(odds[::2], odds[1::2], strict=True))
        failure = f"the question does not fit the judge's context of {context} tokens"
        return [
            Verdict(0.5, failure=failure) if i in long else verdict(*next(told), self.temperature)
            for i in range(len(comparisons))
        ]


def question(principle: str, comparison: Comparison, a: str, b: str) -> str:
    # One pass over the template: what stands in an answer is never filled in again.
    parts = {"principle": principle, "question": asked(comparison.problem), "a": a, "b": b}
    return QUESTION.format_map(parts)


def verdict(shown_first: float, shown_second: float, temperature: float) -> Verdict:
    """From the log-odds of the answer shown as A, when that is the first and when the second."""
    better = (shown_first - shown_second) / 2 / temperature
    bias = (shown_first + shown_second) / 2 / temperature
    return Verdict(1 / (1 + math.exp(-max(-60.0, min(60.0, better)))), bias)


@torch.inference_mode()
def preference_odds(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """log p(A) - log p(B) of the next token after each prompt.

    Args:
        progress: told how many prompts are done.

    Raises:
        TreadleError: A and B begin with the same token, or the model's numbers are not finite.
    """
    a, b = (tokenizer.encode(letter, parse_special=False)[0] for letter in "AB")
    if a == b:
        raise TreadleError("ByJudge: the judge's tokenizer begins A and B alike: take another")
    odds: list[float] = []
    for run in within_budget([len(p) for p in prompts], tokens):
        layout = Layout(tuple(len(prompts[i]) for i in run))
        flat = torch.tensor([t for i in run for t in prompts[i]])
        hidden = model(flat, Packed.of(layout, flat.device))
        ends = torch.tensor([layout.span(i)[-1] for i in range(len(run))])
        logits = model.logits(hidden[ends]).float()
        odds += (logits[:, a] - logits[:, b]).tolist()
        progress(len(odds))
    if not all(map(math.isfinite, odds)):
        raise TreadleError("ByJudge: the judge's log-odds are not finite: its weights are broken")
    return odds
