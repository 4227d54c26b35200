"""A hypernetwork learns fourteen personas and writes adapters for two that it never saw."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.tasks import Task, TaskMix
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.objectives.described import Described
from treadle.optim.adamw import AdamW
from treadle.peft.hypernetwork import Hypernetwork, Written
from treadle.peft.lora import LoRA
from treadle.recipes.personas import SEEN, UNSEEN, asked, questions
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.descriptions import WithDescriptions
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def hypernetwork() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    mix = TaskMix(tasks=tuple(Task(name=p, source=questions(p)) for p in SEEN), draws=4)
    shared = Run(
        name="shared",
        model=base,
        transforms=(LoRA(rank=4, targets=("q", "v")),),
        source=mix,
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        fit=Fit(steps=100),
        minutes=4.0,
    )
    described = WithDescriptions(source=mix, descriptions=tuple(map(words, SEEN)))
    network = shared.replace(
        name="hypernetwork",
        transforms=(Hypernetwork(),),
        source=described,
        objective=Described(objective=CausalLM()),
    )
    trained = Trained(step="hypernetwork")
    written = (
        asked("written", Written(model=trained, description=words(p)), (p,), name=f"written-{p}")
        for p in UNSEEN
    )
    before = (asked("base", base), shared, asked("shared", Trained(step="shared")))
    return Pipeline(name="hypernetwork", steps=(*before, network, *written, SideBySide(), Report()))


def words(persona: str) -> str:
    """The description of a persona is its name."""
    return f"Answer as a person with this trait: {persona.replace('-', ' ')}."
