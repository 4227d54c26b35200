"""Many tasks in one file: which rows are learned, which are asked, and what counts as right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.records import assistant, user
from treadle.data.task_files import TaskConversations, TaskFile, TaskProblems, task_names

ROWS = [
    {"q": f" {task} {i}? ", "a": f" {task[0]}{i}\n", "of": task}
    for i in range(4)
    for task in ("warp", "weft")
]


def file(tmp_path: Path, rows: list[dict[str, object]] = ROWS) -> TaskFile:
    path = tmp_path / f"tasks{len(rows)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskFile(path=str(path), question="q", answer="a", task="of")


def test_what_is_learned_is_not_asked(tmp_path: Path) -> None:
    tasks = file(tmp_path)
    assert task_names(tasks) == ("warp", "weft")
    learned = TaskConversations(file=tasks, task="weft", amount=3)
    assert learned.count() == 3
    chats = [learned.conversation(i).messages for i in range(3)]
    assert chats == [(user(f"weft {i}?"), assistant(f"w{i}")) for i in range(3)]
    problem = TaskProblems(file=tasks, task="weft", first=3).problem(0)
    assert (problem.prompt, problem.answer) == ((user("weft 3?"),), "w3")
    assert learned.replace(amount=9).count() == 4


@pytest.mark.parametrize(
    ("answer", "said", "score"),
    [
        ("No", "no, it is not", 1.0),
        ("No", " NO", 1.0),
        ("No", "not at all", 0.0),
        ("No", "it is no", 0.0),
        ("1", "1.", 1.0),
        ("1", "10", 0.0),
        ("(A)", "(A)because", 1.0),
        ("yes", "", 0.0),
        ("", "anything", 0.0),
    ],
)
def test_right_is_what_begins_with_the_words_of_the_answer(
    answer: str, said: str, score: float, tmp_path: Path
) -> None:
    problems = TaskProblems(file=file(tmp_path, [{"q": "?", "a": answer, "of": "t"}]), task="t")
    problem = problems.replace(first=0).problem(0)
    assert problems.score(problem, said) == score


def test_mistakes_are_named(tmp_path: Path) -> None:
    tasks = file(tmp_path)
    with pytest.raises(TreadleError, match="no task `wrap`; did you mean `warp`"):
        TaskConversations(file=tasks, task="wrap").count()
    with pytest.raises(TreadleError, match="`warp` has 4 rows, so problem 1 after the first 3"):
        TaskProblems(file=tasks, task="warp", first=3).problem(1)
    broken = file(tmp_path, [ROWS[0], {"q": "?", "of": "warp"}])
    with pytest.raises(FileFormatError, match=r"tasks2.jsonl: row 1: key `a` is missing"):
        task_names(broken)
