"""A start that was meta-trained on fourteen personas learns a new one from sixteen examples."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline, Step
from treadle.models.source import ModelSource, Pretrained
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.lora import LoRA
from treadle.recipes.personas import SEEN, UNSEEN, asked, questions
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.meta_train import MetaTrain
from treadle.train.run import Run, Trained


def few_shot() -> Pipeline:
    base, adapter = Pretrained(name="smollm2-135m-instruct"), (LoRA(rank=4),)
    meta = MetaTrain(
        model=base,
        transforms=adapter,
        tasks=tuple(map(questions, SEEN)),
        optimizer=AdamW(lr=3e-3),
        steps=40,
        minutes=8.0,
    )
    steps: list[Step] = [meta]
    for persona in UNSEEN:
        for start, model, added in (
            ("plain", base, adapter),
            ("meta", Trained(step="meta"), ()),
        ):
            run = few(f"{start}-{persona}", persona, model, added)
            steps += [run, asked(start, Trained(step=run.name), (persona,), name=run.name)]
    return Pipeline(name="few-shot", steps=(*steps, SideBySide(), Report()))


def few(name: str, persona: str, model: ModelSource, transforms: tuple[Transform, ...]) -> Run:
    """Eight passes over sixteen examples."""
    return Run(
        name=name,
        model=model,
        transforms=transforms,
        source=questions(persona, 16),
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        fit=Fit(steps=16),
        minutes=0.5,
    )
