"""Which prompt makes a small model do as it is told? Its own proposals are among the candidates."""

from __future__ import annotations

from treadle.alignment.instructions import FollowInstructions
from treadle.core.pipeline import Pipeline
from treadle.evals.evaluate import Exam
from treadle.evals.prompt_search import Induced, OwnShots, SearchPrompts
from treadle.inference.reasoning.prompting import Instructed, ZeroShot
from treadle.inference.sampling import Sampling
from treadle.recipes.instructed import BASE, LONGEST, UNSEEN
from treadle.reports.report import Report


def prompt_search() -> Pipeline:
    search = SearchPrompts(
        name="search",
        model=BASE,
        problems=FollowInstructions(seed=1),
        exam=Exam(name="instructions", problems=UNSEEN, count=150),
        candidates=(ZeroShot(), Instructed(instruction="Follow the instruction exactly.")),
        proposers=(
            Induced(sampling=Sampling(max_tokens=LONGEST)),
            OwnShots(sampling=Sampling(temperature=0.7, max_tokens=LONGEST)),
        ),
        examples=32,
        sampling=Sampling(temperature=0.0, max_tokens=LONGEST),
        minutes=5.0,
    )
    return Pipeline(name="prompt-search", steps=(search, Report()))
