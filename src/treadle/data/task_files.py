"""Many small tasks in one file: each row is a question, its answer, and the task it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import FileFormatError, TreadleError, did_you_mean
from treadle.data.fields import text
from treadle.data.problems import Problems
from treadle.data.read import read_rows
from treadle.data.records import Chat, Problem, assistant, user
from treadle.data.supervised import Conversations

Rows = Mapping[str, Sequence[tuple[str, str]]]


class TaskFile(Config):
    """Where the rows are, and what their keys are called."""

    path: str = Field(min_length=1)
    question: str = "question"
    answer: str = "answer"
    task: str = "task"

    def rows(self, task: str) -> Sequence[tuple[str, str]]:
        """Questions and answers of a task, in the order of the file.

        Raises:
            TreadleError: there is no such task.
        """
        tasks = _tasks(self)
        if task not in tasks:
            raise TreadleError(f"{self.path}: no task `{task}`{did_you_mean(task, tasks)}")
        return tasks[task]


class TaskConversations(Conversations):
    """Some rows of a task, to learn from."""

    file: TaskFile
    task: str
    amount: int = Field(100, ge=1)
    """Rows from the first; the rest is for `TaskProblems`."""

    def conversation(self, index: int) -> Chat:
        question, answer = self.file.rows(self.task)[index]
        return Chat((user(question), assistant(answer)))

    def count(self) -> int | None:
        return min(self.amount, len(self.file.rows(self.task)))


class TaskProblems(Problems):
    """Other rows of a task, as problems: right is what begins with the words of the answer."""

    file: TaskFile
    task: str
    first: int = Field(100, ge=0)
    """Rows before this one were for learning."""

    def problem(self, index: int) -> Problem:
        """Problem number `index`, from 0.

        Raises:
            TreadleError: the task has fewer rows.
        """
        rows = self.file.rows(self.task)
        if self.first + index >= len(rows):
            raise TreadleError(
                f"{self.file.path}: task `{self.task}` has {len(rows)} rows, so problem {index} "
                f"after the first {self.first} is not there; ask for fewer"
            )
        question, answer = rows[self.first + index]
        return Problem((user(question),), answer, "begins_with")

    def score(self, problem: Problem, completion: str) -> float:
        said, wanted = completion.strip().lower(), problem.answer.lower()
        ended = not (said[len(wanted) : len(wanted) + 1].isalnum() and wanted[-1:].isalnum())
        return float(bool(wanted) and said.startswith(wanted) and ended)


@lru_cache(maxsize=4)
def _tasks(file: TaskFile) -> Rows:
    found: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(read_rows(file.path)):
        try:
            pair = (text(row, file.question).strip(), text(row, file.answer).strip())
            found.setdefault(text(row, file.task), []).append(pair)
        except FileFormatError as error:
            raise FileFormatError(f"{file.path}: row {number}: {error}") from None
    return found


def task_names(file: TaskFile) -> tuple[str, ...]:
    """The tasks of a file, in the order in which they come."""
    return tuple(_tasks(file))
