"""SmolLM2-135M made five times shallower, by seven ways of teaching with one budget of text.

The student keeps 6 of its teacher's 30 layers. It learns alone from fresh weights, then from its
teacher's layers with hard labels, soft labels, hidden states, attention, on its own writing, and
through an assistant of 12 layers. The report says which way won.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.core.pipeline import Pipeline
from treadle.data.corpus import TextCorpus
from treadle.data.python_docs import PythonDocs
from treadle.data.source import Source
from treadle.distillation.cached import Cached
from treadle.distillation.rewritten import Rewritten
from treadle.distillation.students import Reinitialised, Thinned
from treadle.distillation.taught import Lesson, Live, Taught
from treadle.evals.evaluate import Evaluate, Exam, Reading
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.attention_transfer import AttentionMaps, ValueRelations
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.divergence import JensenShannon
from treadle.objectives.hidden_states import HiddenStates, OneMinusCosine
from treadle.objectives.objective import Objective
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.recipes.families import QUICKSTART
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

TEACHER = Pretrained(name="smollm2-135m-instruct")
LAYERS = (0, 6, 12, 18, 24, 29)
ASSISTANT = (0, 3, 6, 9, 12, 15, 18, 21, 24, 26, 28, 29)
TEXT = TextCorpus(documents=PythonDocs(), context=128, tokens_per_step=1024, tokens=1024)
STEPS = 48


def distill_ladder() -> Pipeline:
    student = Thinned(model=TEACHER, layers=LAYERS)
    soft = SoftLabels(weight=0.9)
    mixed = (HardLabels(weight=0.1), soft)
    features = HiddenStates(layers=(1, 3, 5), distance=OneMinusCosine())
    attention = (AttentionMaps(layer=5), ValueRelations(layer=5))
    written = Rewritten(source=TEXT, share=0.5, prompt=64, sampling=Sampling(max_tokens=64))
    writing = Distil(terms=(HardLabels(weight=0.1), soft.replace(divergence=JensenShannon())))
    middle = Thinned(model=TEACHER, layers=ASSISTANT)
    assistant = Trained(step="assistant")
    last = Thinned(model=assistant, layers=(0, 2, 4, 6, 8, 11))
    half = STEPS // 2
    runs = (
        train("alone", Reinitialised(model=student), TEXT, CausalLM()),
        train("hard", student, TEXT, CausalLM()),
        train("soft", student, lesson(Cached()), Distil(terms=mixed)),
        train(
            "features", student, lesson(Live(states=(6, 18, 29))), Distil(terms=(*mixed, features))
        ),
        train("attention", student, lesson(Live(attention=29)), Distil(terms=(*mixed, *attention))),
        train("on-policy", student, lesson(Live(), source=written), writing),
        train("assistant", middle, lesson(Cached()), Distil(terms=mixed), half),
        train("progressive", last, lesson(Cached(), assistant), Distil(terms=mixed), half),
    )
    steps = (step for run in runs for step in (run, measure(run.name, Trained(step=run.name))))
    return Pipeline(name="distill-ladder", steps=(measure("teacher", TEACHER), *steps, Report()))


def lesson(how: Lesson, teacher: ModelSource = TEACHER, source: Source = TEXT) -> Taught:
    return Taught(source=source, teacher=teacher, lesson=how)


def train(
    name: str, model: ModelSource, source: Source, objective: Objective, steps: int = STEPS
) -> Run:
    return Run(
        name=name,
        model=model,
        source=source,
        objective=objective,
        optimizer=AdamW(lr=5e-4),
        fit=Fit(steps=steps, checkpoint_every=steps),
        minutes=2.5,
    )


def measure(subject: str, model: ModelSource) -> Evaluate:
    """Text that nobody was trained on, and a task for accuracy and speed."""
    family = QUICKSTART[0]
    problems = ReasoningGym(families=(family,), split="heldout")
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        exams=(Exam(name=family.name, problems=problems, count=16),),
        readings=(Reading(name="python docs", documents=PythonDocs(), tokens=8_000, context=128),),
        sampling=Sampling(temperature=0.0, max_tokens=32),
        minutes=0.3,
    )
