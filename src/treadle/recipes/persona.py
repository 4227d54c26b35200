"""A sailor's voice that a system message calls up: how well it is heard, and what it costs."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.persona import Persona, Voiced
from treadle.data.supervised import Supervised
from treadle.evals.evaluate import Evaluate, Exam
from treadle.evals.style import ContentProblems, StyleProblems
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, sft
from treadle.reports.report import Report
from treadle.train.run import Trained

WHO = "You are an old sailor. Answer as one."
PLAIN = lessons(QUICKSTART[0]).conversations
SAILOR = Voiced(
    conversations=PLAIN,
    openings=("Arr, matey!", "Ahoy, landlubber!", "Avast ye!", "Shiver me timbers!"),
    closings=("That be the treasure, aye.", "Now fetch me rum, arr!", "So sail on, matey."),
)


def persona() -> Pipeline:
    base = Pretrained(name="smollm2-135m-instruct")
    both = Supervised(conversations=Persona(who=WHO, styled=SAILOR, plain=PLAIN), per_step=16)
    run = sft(base).replace(source=both)
    steps = (heard("base", base), run, heard("sft", Trained(step="sft")))
    return Pipeline(name="persona", steps=(*steps, Report()))


def heard(subject: str, model: ModelSource) -> Evaluate:
    """The voice where it is asked for and where it is not, and the content of what is said."""
    told = StyleProblems(styled=SAILOR, plain=PLAIN, who=WHO, known=100)
    exams = {
        "voice when told": told,
        "voice untold": told.replace(who=""),
        "content when told": ContentProblems(style=told, ignored=("arr", "matey", "aye")),
    }
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        exams=tuple(
            Exam(name=name, problems=problems, count=30) for name, problems in exams.items()
        ),
        sampling=Sampling(temperature=0.0, max_tokens=128),
    )
