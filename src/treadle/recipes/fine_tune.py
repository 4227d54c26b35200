"""One fine-tuning of a known model, measured before and after: the place to try any method."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.models.source import Pretrained
from treadle.recipes.quickstart import measured, sft
from treadle.reports.report import Report
from treadle.train.run import Trained


def fine_tune() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    after = measured("sft", Trained(step="sft"))
    return Pipeline(name="fine-tune", steps=(measured("base", base), sft(base), after, Report()))
