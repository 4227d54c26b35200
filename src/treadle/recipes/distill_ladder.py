"""A specialist made half as large, by seven ways of teaching with one budget of examples.

SmolLM2-135M learns to count legs step by step; then a student of 10 of its 30 layers learns it
alone from fresh weights, from its teacher's layers with hard labels, soft labels, hidden states,
attention, on its own writing, and through an assistant of 20 layers. The report says which way won.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.core.processes import ProcessPerStep
from treadle.data.python_docs import PythonDocs
from treadle.data.source import Source
from treadle.data.supervised import Supervised
from treadle.distillation.cached import Cached
from treadle.distillation.rewritten import Rewritten
from treadle.distillation.students import Reinitialised, Thinned
from treadle.distillation.taught import Lesson, Live, Taught
from treadle.evals.answers import Answers
from treadle.evals.evaluate import Evaluate, Exam, Reading
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.models.transform import Transform
from treadle.objectives.attention_transfer import AttentionMaps, ValueRelations
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.divergence import JensenShannon
from treadle.objectives.hidden_states import HiddenStates, OneMinusCosine
from treadle.objectives.objective import Objective
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.recipes.families import QUICKSTART
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

LEGS = QUICKSTART[0]
TASK = Supervised(
    conversations=WorkedSolutions(problems=ReasoningGym(families=(LEGS,)), amount=1024), per_step=8
)
HELD_OUT = ReasoningGym(families=(LEGS,), split="heldout")
BASE = Pretrained(name="smollm2-135m-instruct")
TEACHER = Trained(step="teacher")
LAYERS = (0, 3, 6, 9, 12, 16, 19, 22, 26, 29)
ASSISTANT = (0, 1, 3, 4, 6, 7, 9, 10, 12, 14, 16, 17, 19, 20, 22, 23, 25, 26, 28, 29)
STEPS = 64


def distill_ladder() -> Pipeline:
    student = Thinned(model=TEACHER, layers=LAYERS)
    soft = SoftLabels(weight=0.9)
    mixed = (HardLabels(weight=0.1), soft)
    features = HiddenStates(layers=(3, 6, 9), distance=OneMinusCosine())
    attention = (AttentionMaps(layer=9), ValueRelations(layer=9))
    written = Rewritten(source=TASK, share=0.5, sampling=Sampling(max_tokens=80))
    writing = Distil(terms=(HardLabels(weight=0.1), soft.replace(divergence=JensenShannon())))
    assistant = Trained(step="assistant")
    middle = Thinned(model=TEACHER, layers=ASSISTANT)
    last = Thinned(model=assistant, layers=tuple(map(ASSISTANT.index, LAYERS)))
    half = STEPS // 2
    runs = (
        specialist(BASE),
        train("alone", Reinitialised(model=student), TASK, CausalLM()),
        train("hard", student, TASK, CausalLM()),
        train("soft", student, lesson(Cached()), Distil(terms=mixed)),
        train(
            "features", student, lesson(Live(states=(9, 19, 29))), Distil(terms=(*mixed, features))
        ),
        train("attention", student, lesson(Live(attention=29)), Distil(terms=(*mixed, *attention))),
        train("on-policy", student, lesson(Live(), source=written), writing),
        train("assistant", middle, lesson(Cached()), Distil(terms=mixed), half),
        train("progressive", last, lesson(Cached(), assistant), Distil(terms=mixed), half),
    )
    steps = (step for run in runs for step in (run, measure(run.name)))
    return Pipeline(
        name="distill-ladder",
        steps=(*steps, SideBySide(), Report()),
        processes=ProcessPerStep(),
    )


def specialist(base: ModelSource) -> Run:
    """The teacher: a model that has learned the task with LoRA."""
    return train("teacher", base, TASK, CausalLM(), lr=2e-3, transforms=(LoRA(rank=16),))


def lesson(how: Lesson, teacher: ModelSource = TEACHER, source: Source = TASK) -> Taught:
    return Taught(source=source, teacher=teacher, lesson=how)


def train(
    name: str,
    model: ModelSource,
    source: Source,
    objective: Objective,
    steps: int = STEPS,
    lr: float = 5e-4,
    transforms: tuple[Transform, ...] = (),
) -> Run:
    return Run(
        name=name,
        model=model,
        transforms=transforms,
        source=source,
        objective=objective,
        optimizer=AdamW(lr=lr),
        fit=Fit(steps=steps, checkpoint_every=steps),
        minutes=3.0,
    )


def measure(subject: str) -> Evaluate:
    """The task by generation and by likelihood, and text of another kind."""
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=Trained(step=subject),
        exams=(Exam(name=LEGS.name, problems=HELD_OUT, count=64),),
        benchmarks=(Answers(conversations=WorkedSolutions(problems=HELD_OUT), limit=64),),
        readings=(Reading(name="python docs", documents=PythonDocs(), tokens=4_000),),
        sampling=Sampling(temperature=0.0, max_tokens=96),
        minutes=0.5,
    )
