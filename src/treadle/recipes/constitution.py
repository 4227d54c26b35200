"""A model revises its answers by a constitution and learns from that; then it judges its answers by
the same constitution and learns from its verdicts."""

from __future__ import annotations

from treadle.alignment.constitution import ByConstitution, ConstitutionOf, Revise, Violations
from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.iterate import Compare, PairsOf
from treadle.alignment.preferences import Preferences
from treadle.core.pipeline import Pipeline
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Cosine
from treadle.peft.lora import LoRA
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

RULES = ConstitutionOf(step="revise")


def constitution() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    revise = Revise(
        name="revise",
        model=base,
        problems=FollowInstructions(),
        constitution="principles.yaml",
        minutes=2.0,
    )
    train = Run(
        name="revised",
        model=base,
        transforms=(LoRA(rank=16),),
        source=Preferences(pairs=PairsOf(step="revise"), per_step=16),
        objective=DPO(beta=0.1, anchor=1.0),
        optimizer=AdamW(lr=2e-4),
        schedule=Cosine(),
        fit=Fit(steps=12),
        minutes=3.0,
    )
    label = Compare(
        name="label",
        model=Trained(step="revised"),
        problems=FollowInstructions(seed=1),
        labeller=ByConstitution(constitution=RULES),
        minutes=2.0,
    )
    again = train.replace(
        name="preferred",
        model=Trained(step="revised"),
        transforms=(),
        source=Preferences(pairs=PairsOf(step="label"), per_step=16),
    )
    measured = (kept("base", base), kept("revised"), kept("preferred"))
    steps = (revise, measured[0], train, measured[1], label, again, measured[2], Report())
    return Pipeline(name="constitution", steps=steps)


def kept(subject: str, model: ModelSource | None = None) -> Violations:
    """Questions that no stage was trained on."""
    return Violations(
        name=f"measure-{subject}",
        model=model or Trained(step=subject),
        subject=subject,
        problems=FollowInstructions(held_out=True),
        constitution=RULES,
    )
