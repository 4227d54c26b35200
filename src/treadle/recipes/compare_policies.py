"""PPO and every variant of GRPO from the same start, with equal samples, three seeds each.

Instructions that a program checks, which the model as it was published follows one time in six.
LoRA, so that an evening on a processor is enough. The start is measured before, each run after, by
answers that are sampled as they were while it learned; the table has means, spreads and gains.
"""

from __future__ import annotations

from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.peft.lora import LoRA
from treadle.recipes.policy_methods import Contest
from treadle.reports.report import Report
from treadle.reports.seeds import SeedTable


def compare_policies() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    contest = Contest(
        start=base,
        transforms=(LoRA(rank=16),),
        problems=FollowInstructions(),
        held_out=FollowInstructions(held_out=True),
        sampler=NativeKernels(),
        longest=40,
        lots=16,
        lr=3e-4,
        temperature=1.0,
        exam=150,
    )
    return Pipeline(
        name="compare-policies",
        steps=(contest.measured("base", base), *contest.steps(), SeedTable(), Report()),
    )
