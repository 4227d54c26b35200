"""Two LoRA adapters, each trained on its own task, become one model that routes each token."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.models.source import ModelSource, Pretrained
from treadle.models.transform import Transform
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.peft.mixture import MixtureOfAdapters
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, measured, sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def adapter_mixture() -> Pipeline:
    experts = one_each(LoRA(rank=16))
    mixture = MixtureOfAdapters(experts=tuple(Trained(step=run.name) for run in experts))
    return together("adapter-mixture", experts, mixture, lr=1e-3)


def one_each(adapter: Transform) -> tuple[Run, ...]:
    """An adapter for each task, trained on that task alone."""
    base = sft(Pretrained(name="smollm2-135m-instruct"))
    return tuple(
        base.replace(
            name=family.name.replace("_", "-"),
            transforms=(adapter,),
            source=lessons(family),
            fit=Fit(steps=48),
        )
        for family in QUICKSTART
    )


def together(name: str, experts: tuple[Run, ...], model: ModelSource, lr: float) -> Pipeline:
    """The experts, and what is learned to bring them together; each measured on all tasks."""
    router = sft(model).replace(
        name="together",
        transforms=(),
        optimizer=AdamW(lr=lr),
        fit=Fit(steps=16),
        minutes=1.5,
    )
    steps = (
        step
        for run in (*experts, router)
        for step in (run, measured(run.name, Trained(step=run.name)))
    )
    return Pipeline(name=name, steps=(*steps, Report()))
