"""What the tasks of models with heads have in common: texts in, the head's numbers out."""

from __future__ import annotations

from treadle.core.errors import TreadleError
from treadle.evals.task import Subject
from treadle.inference.reader import Reader
from treadle.models.heads import VectorReadout, task_head


def reader_of(subject: Subject, longest: int) -> Reader:
    """The model under test, with a head.

    Raises:
        TreadleError: it has none.
    """
    task_head(subject.model)
    return Reader(
        subject.model,
        subject.tokenizer,
        longest=longest,
        tokens=subject.tokens,
        autocast=subject.autocast,
    )


def labels_of(subject: Subject, task: str) -> tuple[str, ...]:
    """The labels of the model under test.

    Raises:
        TreadleError: its head has none.
    """
    labels = task_head(subject.model).labels
    if not labels:
        raise TreadleError(f"task `{task}`: the model gives no labels: train one with a ClassHead")
    return labels


def gives_vectors(subject: Subject) -> bool:
    """Whether the model under test embeds texts; one that gives a number reads pairs."""
    return isinstance(task_head(subject.model), VectorReadout)
