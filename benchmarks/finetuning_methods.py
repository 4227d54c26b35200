"""What the ways to learn several tasks are worth on SmolLM2-135M: two small tasks, one budget each.

    cp DATA/pref/anthropic_persona.jsonl.gz personas.jsonl.gz
    treadle run benchmarks/finetuning_methods.py

Two personas of github.com/anthropics/evals: would it say this, Yes or No? Each run takes the same
number of steps of eight examples; the exams are 60 questions of each persona that nobody learned
from. Half of all answers are Yes, so a coin is right half the time.
"""

from __future__ import annotations

from collections.abc import Iterator

from treadle.alignment.unlearning import Unlearning
from treadle.core.pipeline import Pipeline, Step
from treadle.data.curriculum import Curriculum, ModelLoss, RootPace
from treadle.data.replay import Replayed
from treadle.data.supervised import Supervised
from treadle.data.tasks import Task, TaskMix
from treadle.distillation.lwf import without_forgetting
from treadle.evals.evaluate import Evaluate
from treadle.evals.forgetting import ForgettingScore, Stage
from treadle.models.source import ModelSource, Pretrained
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.objectives.ewc import EWC
from treadle.objectives.unlearn import NPO, Forget, GradientAscent, Unlearn
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.fusion import AdapterFusion
from treadle.peft.lora import LoRA
from treadle.peft.mixture import MixtureOfAdapters
from treadle.recipes.personas import asked, questions
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fisher import Fisher, Remembered
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

BASE = Pretrained(name="smollm2-135m-instruct")
FIRST, SECOND = TASKS = ("agreeableness", "risk-seeking")
STEPS = 32


def finetuning_methods() -> Pipeline:
    mix = TaskMix(tasks=tuple(Task(name=t, source=questions(t)) for t in TASKS), draws=1)
    first, second = (learn(f"only-{t}", BASE, t) for t in TASKS)
    both = first.replace(name="multi-task", source=mix)
    runs = (first, second, both, *curricula(both), *one_after_the_other(first), *unlearned(both))
    steps = (step for run in (*runs, *together(mix)) for step in measured(run))
    return Pipeline(
        name="finetuning-methods",
        steps=(exam("base", BASE), *steps, SideBySide(), Report()),
    )


def learn(name: str, model: ModelSource, task: str, *transforms: Transform) -> Run:
    return Run(
        name=name,
        model=model,
        transforms=transforms or (LoRA(rank=8),),
        source=questions(task),
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        schedule=Cosine(),
        fit=Fit(steps=STEPS),
    )


def curricula(both: Run) -> Iterator[Step]:
    """The first task alone, its easy examples first."""
    ordered = Curriculum(
        source=questions(FIRST), pacing=RootPace(steps=STEPS // 2), difficulty=ModelLoss()
    )
    yield both.replace(name="curriculum", source=ordered)


def one_after_the_other(first: Run) -> Iterator[Step]:
    """The second task after the first, with and without care for the first."""
    done = Trained(step=first.name)
    naive = learn("naive", done, SECOND).replace(transforms=())
    yield naive
    yield Fisher(model=done, source=questions(FIRST), examples=32)
    remembered = Remembered(model=done, step="fisher")
    yield naive.replace(name="ewc", model=remembered, objective=EWC(objective=CausalLM()))
    old, new = (questions(task).conversations for task in TASKS)
    yield naive.replace(
        name="replay",
        source=Supervised(conversations=Replayed(new=new, old=(old,)), per_step=8),
    )
    kept = without_forgetting(questions(SECOND), done)
    yield naive.replace(name="lwf", source=kept.source, objective=kept.objective)


def unlearned(both: Run) -> Iterator[Step]:
    """The first of two tasks is to be forgotten, the second kept."""
    gone, kept = (questions(task).conversations for task in TASKS)
    ways: tuple[tuple[str, Forget, float], ...] = (
        ("npo", NPO(), 1.0),
        ("ascent", GradientAscent(), 1.0),
        ("ascent-alone", GradientAscent(), 0.0),
    )
    for name, forget, retain in ways:
        yield both.replace(
            name=name,
            model=Trained(step=both.name),
            transforms=(),
            source=Unlearning(forget=gone, retain=kept),
            objective=Unlearn(forget=forget, retain=retain),
            optimizer=AdamW(lr=5e-5),
            fit=Fit(steps=12),
        )


def together(mix: TaskMix) -> Iterator[Step]:
    """Adapters of one task each, and what is learned on both to choose between them."""
    experts = tuple(Trained(step=f"only-{task}") for task in TASKS)
    router = learn("mixture", MixtureOfAdapters(experts=experts), FIRST).replace(
        transforms=(), source=mix, fit=Fit(steps=STEPS // 2)
    )
    yield router
    small = Bottleneck(width=32, targets=("ffn",))
    for task in TASKS:
        yield learn(f"adapter-{task}", BASE, task, small)
    fused = tuple(Trained(step=f"adapter-{task}") for task in TASKS)
    yield router.replace(
        name="fusion", model=AdapterFusion(experts=fused), optimizer=AdamW(lr=1e-4)
    )


def measured(step: Step) -> Iterator[Step]:
    yield step
    if isinstance(step, Run):
        yield exam(step.name, Trained(step=step.name))
    if step.name in ("naive", "ewc", "replay", "lwf"):
        stages = (
            Stage(step=f"measure-only-{FIRST}", task=FIRST),
            Stage(step=f"measure-{step.name}", task=SECOND),
        )
        yield ForgettingScore(name=f"forgetting-{step.name}", stages=stages)


def exam(subject: str, model: ModelSource) -> Evaluate:
    whole = asked(subject, model, TASKS)
    return whole.replace(exams=tuple(e.replace(count=60) for e in whole.exams))
