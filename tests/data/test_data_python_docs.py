"""The documentation inside Python as a corpus."""

from __future__ import annotations

import ast
import json
from itertools import islice
from pathlib import Path

import pytest

from treadle.core.errors import TreadleError
from treadle.data import python_docs as room
from treadle.data.python_docs import (
    Comments,
    Docstrings,
    Extract,
    PythonDocs,
    SourceCode,
    held_out,
)

SOURCE = b'''# -*- coding: utf-8 -*-
"""A module that explains itself at some length, so that it is not too short to be read at all.

>>> answer()
42
and a line of output

After an example the prose goes on."""

X = """not documentation, however long it is: a string that is assigned to a name in the module"""

# A comment of several lines that says why the code below is as it is, and not otherwise:
# there is a reason.

def answer():  # not this one
    """Short."""
    # Another comment, which is indented, and which is also long enough to be taken as a passage.
    return 42


class Weaver:
    def weave(self):
        \'\'\'Indented prose of a method, which
        goes on in a second line
            and keeps the deeper indent of a third line.\'\'\'
'''


def test_docstrings_are_what_python_says_they_are() -> None:
    found = list(Docstrings(shortest=1)(SOURCE))
    tree = ast.parse(SOURCE)
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    told = [d for n in nodes if (d := ast.get_docstring(n))]
    assert found[1:] == told[1:]
    assert len(list(Docstrings()(SOURCE))) == 2


def test_interpreter_sessions_are_left_out() -> None:
    (first, _) = Docstrings()(SOURCE)
    assert first == (
        "A module that explains itself at some length, so that it is not too short to be read at "
        "all.\n\n\nAfter an example the prose goes on."
    )


def test_comments_are_joined_to_passages() -> None:
    assert list(Comments()(SOURCE)) == [
        "A comment of several lines that says why the code below is as it is, and not otherwise:\n"
        "there is a reason.",
        "Another comment, which is indented, and which is also long enough to be taken as a "
        "passage.",
    ]


def test_source_code_is_whole() -> None:
    assert list(SourceCode()(SOURCE)) == [SOURCE.decode()]


@pytest.mark.parametrize("extract", [Docstrings(), Comments(), SourceCode()])
@pytest.mark.parametrize("broken", [b"def (", b"\x00", b"'''", b"\xff\xfe", b""])
def test_what_is_not_python_gives_nothing(extract: Extract, broken: bytes) -> None:
    assert list(extract(broken)) == []


# The corpus, in small: the library is a folder of a few files


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(60):
        (tmp_path / f"m{number:02}.py").write_text(
            f'"""Module {number} says something of its own, at a length that is worth reading.\n\n'
            'This paragraph is in every module, word for word, so it is to be kept only once."""\n'
        )
    for skipped in ("test", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "x.py").write_text(f'"""{"Never to be read. " * 20}"""')
    monkeypatch.setattr(room.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr("pydoc_data.topics.topics", {"yield": "How yield works.", "with": "With."})
    return tmp_path


def test_every_document_is_on_one_side(library: Path) -> None:
    training = [t.text for t in PythonDocs().training()]
    held = [t.text for t in PythonDocs().held_out()]
    assert len(training) + len(held) == 62
    assert 2 <= len(held) <= 14
    assert not set(training) & set(held)
    for number in range(60):
        side = held if held_out(f"m{number:02}.py") else training
        assert any(f"Module {number} says" in text for text in side)
    assert not any("Never" in text for text in (*training, *held))


def test_no_paragraph_comes_twice(library: Path) -> None:
    texts = [text.text for text, _ in PythonDocs().documents()]
    assert sum("in every module" in text for text in texts) == 1


def test_a_new_file_moves_nothing_to_the_other_side(library: Path) -> None:
    before = {text.text: held for text, held in PythonDocs().documents()}
    (library / "a_first.py").write_text('"""' + "A file that comes before all others. " * 5 + '"""')
    after = {text.text: held for text, held in PythonDocs().documents()}
    assert all(after[text] == held for text, held in before.items())
    assert len(after) == len(before) + 1


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(TreadleError, match="no package `no_such_package` here: install it"):
        next(PythonDocs(packages=("no_such_package",)).documents())


# The real one


def test_what_is_on_this_machine() -> None:
    documents = list(islice(PythonDocs().documents(), 85))
    assert [t.text for t, _ in documents] == [
        t.text for t, _ in islice(PythonDocs().documents(), 85)
    ]
    assert sum(len(t.text) for t, _ in documents) > 300_000
    assert any("yield" in t.text for t, _ in documents)


def test_a_package_adds_to_it(library: Path) -> None:
    names = json.dumps([t.text[:200] for t, _ in PythonDocs(packages=("jinja2",)).documents()])
    assert "Jinja is a template engine" in names
