"""Which prompt makes a small model answer best? Its own proposals are among the candidates."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.core.pipeline import Pipeline
from treadle.evals.evaluate import Exam
from treadle.evals.prompt_search import SearchPrompts
from treadle.inference.sampling import Sampling
from treadle.models.source import Pretrained
from treadle.reports.report import Report

SUMS = ReasoningGym(
    families=(
        Family(
            name="chain_sum",
            settings=(("min_terms", 2), ("max_terms", 3), ("min_digits", 1), ("max_digits", 2)),
        ),
    ),
    instruction='Give the result after "Answer:".',
)


def prompt_search() -> Pipeline:
    search = SearchPrompts(
        name="search",
        model=Pretrained(name="smollm2-135m-instruct"),
        problems=SUMS,
        exam=Exam(name="chain_sum", problems=SUMS.replace(split="heldout"), count=100),
        sampling=Sampling(temperature=0.0, max_tokens=96),
        minutes=6.0,
    )
    return Pipeline(name="prompt-search", steps=(search, Report()))
