"""A task is weighed weight by weight, and then only the weights that matter most to it train."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.train.fisher import Fisher, FisherMasked
from treadle.train.run import Trained


def fish_mask() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    fisher = Fisher(model=base, source=lessons(*QUICKSTART))
    run = sft(FisherMasked(model=base, step="fisher", density=0.005)).replace(transforms=())
    after = measured("sft", Trained(step="sft"))
    return Pipeline(name="fish-mask", steps=(fisher, run, after, Report()))
