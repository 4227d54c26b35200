"""PPO and every variant of GRPO from the same start, with equal samples, three seeds each.

Short sums with their steps, so that an evening on a processor is enough. The start is measured
before, each run after, on the same held-out sums; the table has means, spreads and gains.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.samplers import NativeKernels
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Supervised
from treadle.models.source import Pretrained
from treadle.recipes.policy_methods import Contest
from treadle.recipes.quickstart import sft
from treadle.reports.report import Report
from treadle.reports.seeds import SeedTable
from treadle.train.fit import Fit
from treadle.train.run import Trained

SUMS = ReasoningGym(
    families=(
        Family(
            name="chain_sum",
            settings=(("min_terms", 2), ("max_terms", 2), ("min_digits", 2), ("max_digits", 2)),
        ),
    ),
    instruction="",
)


def compare_policies() -> Pipeline:
    contest = Contest(
        start="sft", problems=SUMS, sampler=NativeKernels(), longest=24, lots=12, lr=1e-4
    )
    lessons = Supervised(conversations=WorkedSolutions(problems=SUMS, amount=512), per_step=16)
    start = sft(Pretrained(name="smollm2-135m-instruct")).replace(
        source=lessons, fit=Fit(steps=12), minutes=1.5
    )
    return Pipeline(
        name="compare-policies",
        steps=(
            start,
            contest.measured("sft", Trained(step="sft")),
            *contest.steps(),
            SeedTable(),
            Report(),
        ),
    )
