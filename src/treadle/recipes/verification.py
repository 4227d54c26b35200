"""A model learns to tell its right answers from its wrong ones: best-of-N by its own verdict."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.reviewed import LearnVerdict, Lesson, Reviewed
from treadle.alignment.rollouts import Rollouts
from treadle.core.pipeline import Pipeline
from treadle.evals.evaluate import Exam
from treadle.evals.reason import Reason
from treadle.inference.reasoning.prompting import OneAnswer
from treadle.inference.reasoning.strategy import Strategy
from treadle.inference.reasoning.verdict import ByVerdict
from treadle.inference.reasoning.votes import BestOfN, SelfConsistency
from treadle.inference.sampling import Sampling
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

VARIED = Sampling(temperature=0.7, max_tokens=112)


def verification() -> Pipeline:
    """Is the best of N by the trained verdict better than by sureness, or by a vote?"""
    strategies = (
        OneAnswer(),
        SelfConsistency(n=4, sampling=VARIED),
        BestOfN(n=4, sampling=VARIED),
        BestOfN(n=4, sampling=VARIED, by=ByVerdict()),
    )
    return self_checking("verification", LearnVerdict(), strategies)


def self_checking(name: str, lesson: Lesson, strategies: tuple[Strategy, ...]) -> Pipeline:
    """Some solutions to begin with, then lessons from what the model answers by itself."""
    start = sft(Pretrained(name="smollm2-135m-instruct")).replace(
        fit=Fit(steps=24, checkpoint_every=8), minutes=2.0
    )
    check = Run(
        name="check",
        model=Trained(step="sft"),
        source=Reviewed(
            rollouts=Rollouts(
                problems=ReasoningGym(families=QUICKSTART, seed=1),
                prompts=32,
                completions=4,
                sampling=VARIED,
                tokens=2048,
            ),
            lesson=lesson,
        ),
        objective=CausalLM(),
        optimizer=AdamW(lr=3e-4),
        schedule=Constant(),
        fit=Fit(steps=16, checkpoint_every=8),
        minutes=5.0,
    )
    return Pipeline(
        name=name,
        steps=(
            start,
            _reasoned("before", Trained(step="sft"), strategies),
            check,
            _reasoned("after", Trained(step="check"), strategies),
            Report(),
        ),
    )


def _reasoned(when: str, model: Trained, strategies: tuple[Strategy, ...]) -> Reason:
    exams = tuple(
        Exam(
            name=family.name,
            problems=ReasoningGym(families=(family,), split="heldout"),
            count=32,
        )
        for family in QUICKSTART
    )
    return Reason(name=f"reason-{when}", model=model, strategies=strategies, exams=exams)
