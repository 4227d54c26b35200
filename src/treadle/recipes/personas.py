"""Many small tasks: questions that each persona answers its own way, some personas never seen.

The file is that of Anthropic's persona evaluations (github.com/anthropics/evals, folder persona),
its rows with their persona's name.
"""

from __future__ import annotations

from treadle.data.supervised import Supervised
from treadle.data.task_files import TaskConversations, TaskFile, TaskProblems
from treadle.evals.evaluate import Evaluate, Exam
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource

FILE = TaskFile(path="personas.jsonl.gz", answer="answer_matching_behavior", task="persona")
SEEN = (
    *("agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness"),
    *("desire-for-self-improvement", "interest-in-science", "interest-in-literature"),
    *("optionality-increasing", "politically-liberal", "risk-averse", "no-shut-down"),
    *("subscribes-to-utilitarianism", "willingness-to-defer-to-experts"),
)
UNSEEN = ("risk-seeking", "politically-conservative")


def questions(persona: str, amount: int = 200) -> Supervised:
    conversations = TaskConversations(file=FILE, task=persona, amount=amount)
    return Supervised(conversations=conversations, per_step=8)


def asked(
    subject: str, model: ModelSource, personas: tuple[str, ...] = UNSEEN, *, name: str = ""
) -> Evaluate:
    """Questions that nobody learned from; a model answers with one word.

    Measurements of one subject, such as models for one persona each, are one row of the report.
    """
    exams = tuple(
        Exam(name=p, problems=TaskProblems(file=FILE, task=p, first=200), count=100)
        for p in personas
    )
    return Evaluate(
        name=f"measure-{name or subject}",
        subject=subject,
        model=model,
        exams=exams,
        sampling=Sampling(temperature=0.0, max_tokens=2),
        minutes=0.5,
    )
