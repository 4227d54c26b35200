"""One fine-tuning of a known model, measured before and after: the place to try any method."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Supervised
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def fine_tune() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    problems = ReasoningGym(families=QUICKSTART)
    sft = Run(
        name="sft",
        model=base,
        transforms=(LoRA(rank=16),),
        source=Supervised(
            conversations=WorkedSolutions(problems=problems, amount=1024), per_step=16
        ),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3),
        fit=Fit(steps=64, checkpoint_every=16),
        minutes=4.0,
    )
    after = measured("sft", Trained(step="sft"))
    return Pipeline(name="fine-tune", steps=(measured("base", base), sft, after, Report()))
