"""A small student learns its teacher's way to the answer beside the answer, and answers briefly.

A specialist solves problems in steps; what the verifier accepts is learned by two students of a
third of its layers: one from the results alone, one from results and steps as two tasks. Both are
asked for the result alone.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.core.pipeline import Pipeline
from treadle.distillation.rationales import Rationales, StepByStep
from treadle.distillation.students import Thinned
from treadle.evals.evaluate import Evaluate, Exam
from treadle.inference.sampling import Sampling
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.recipes.distill_ladder import BASE, LAYERS, LEGS, TEACHER, specialist
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

BRIEF = "Give only the result."
STEPS = 64


def distill_steps() -> Pipeline:
    rationales = Rationales(
        teacher=TEACHER,
        problems=ReasoningGym(families=(LEGS,), seed=1),
        count=256,
        sampling=Sampling(temperature=0.0, max_tokens=96),
        minutes=2.0,
    )
    runs = (student("results", 0.0), student("steps", 1.0))
    steps = (step for run in runs for step in (run, brief(run.name)))
    return Pipeline(
        name="distill-steps",
        steps=(specialist(BASE), rationales, *steps, SideBySide(), Report()),
    )


def student(name: str, rationale: float) -> Run:
    return Run(
        name=name,
        model=Thinned(model=TEACHER, layers=LAYERS),
        source=StepByStep(step="rationales", ask_result=BRIEF, rationale=rationale),
        objective=CausalLM(),
        optimizer=AdamW(lr=5e-4),
        fit=Fit(steps=STEPS, checkpoint_every=STEPS),
        minutes=3.0,
    )


def brief(subject: str) -> Evaluate:
    problems = ReasoningGym(families=(LEGS,), split="heldout", instruction=BRIEF)
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=Trained(step=subject),
        exams=(Exam(name=LEGS.name, problems=problems, count=64),),
        sampling=Sampling(temperature=0.0, max_tokens=16),
        minutes=0.3,
    )
