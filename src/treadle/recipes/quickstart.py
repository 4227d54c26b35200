"""The main job: a small model learns a task that it cannot do, and a person talks to it.

Base model -> worked solutions (SFT with LoRA) -> reinforcement with a verifier (GRPO) -> merged,
quantised to 4 bits, exported; measured after every stage on the same held-out problems.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.data.python_docs import PythonDocs
from treadle.data.supervised import Supervised
from treadle.evals.evaluate import Evaluate, Exam, Reading
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.causal import CausalLM
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant, Cosine
from treadle.peft.lora import LoRA
from treadle.quantization.gptq import GPTQ
from treadle.recipes.families import QUICKSTART
from treadle.reports.report import Report
from treadle.train.export import Export, Exported
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def quickstart() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    grpo = Run(
        name="grpo",
        model=Trained(step="sft"),
        source=Rollouts(
            problems=ReasoningGym(families=QUICKSTART, seed=1),
            prompts=8,
            completions=8,
            sampling=Sampling(max_tokens=112),
            tokens=2048,
        ),
        objective=GRPO(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=10, checkpoint_every=2),
        minutes=4.0,
    )
    export = Export(
        model=Trained(step="grpo"),
        format="Q4_1",
        rounding=GPTQ(
            source=lessons(*QUICKSTART),
            damp=0.001,
        ),
    )
    return Pipeline(
        name="quickstart",
        steps=(
            measured("base", base),
            sft(base),
            measured("sft", Trained(step="sft")),
            grpo,
            measured("grpo", Trained(step="grpo")),
            export,
            measured("quantised", Exported(step="export")),
            Report(),
        ),
    )


def lessons(*families: Family) -> Supervised:
    """Worked solutions of these families, to learn from."""
    solutions = WorkedSolutions(problems=ReasoningGym(families=families), amount=1024)
    return Supervised(conversations=solutions, per_step=16)


def sft(base: ModelSource) -> Run:
    """The first training of a model that cannot do the task."""
    return Run(
        name="sft",
        model=base,
        transforms=(LoRA(rank=16),),
        source=lessons(*QUICKSTART),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3),
        schedule=Cosine(),
        fit=Fit(steps=64, checkpoint_every=16),
        minutes=4.0,
    )


def measured(subject: str, model: ModelSource) -> Evaluate:
    """The same held-out problems and text for every stage."""
    exams = tuple(
        Exam(
            name=family.name,
            problems=ReasoningGym(families=(family,), split="heldout"),
            count=50,
        )
        for family in QUICKSTART
    )
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        exams=exams,
        readings=(Reading(name="python docs", documents=PythonDocs(), tokens=8_000),),
        sampling=Sampling(temperature=0.0, max_tokens=128),
    )
