from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.conversations import ConversationFiles, HeldOutConversations
from treadle.data.convert import convert
from treadle.data.formats import AlpacaFormat, FlanFormat
from treadle.data.records import Chat, Text, assistant, record_text, user
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.spool import Spool, open_records
from treadle.data.supervised import Supervised


def test_real_conversations_by_number(shared_data: Path) -> None:
    path = shared_data / "sft" / "gpteacher_codegen.jsonl.gz"
    files = ConversationFiles(path=str(path))
    with gzip.open(path, "rt") as file:
        expected = list(convert(map(json.loads, file)))
    assert files.count() == len(expected) == 4535
    for index in (0, 4534, 17, 0):
        assert files.conversation(index) == expected[index]


def test_parts_are_apart(shared_data: Path) -> None:
    path = str(shared_data / "sft" / "openbookqa_train_instruct.jsonl.gz")
    files = ConversationFiles(path=path, parts=LeakFreeSplit(validation=0.1, test=0))
    held = HeldOutConversations(of=files)
    assert files.count() + held.count() == 4957
    assert held.count() == pytest.approx(496, rel=0.3)
    training = {record_text(files.conversation(i)) for i in range(files.count())}
    assert not any(record_text(held.conversation(i)) in training for i in range(held.count()))


def test_a_format_can_be_named(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "sft" / "tatoeba_en_fr.jsonl.gz"
    with gzip.open(path, "rt") as file:
        head = [next(file) for _ in range(20)]
    (tmp_path / "few.jsonl").write_text("".join(head))
    files = ConversationFiles(
        path=str(tmp_path / "few.jsonl"), format=FlanFormat(inputs="en", targets="fr")
    )
    assert files.conversation(0) == Chat((user("Go."), assistant("Va !")))
    source = Supervised(conversations=files)
    assert from_yaml(to_yaml(source), expect=Supervised) == source


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(FileFormatError, match=r"a.jsonl: row 1: key `output` is missing"):
        ConversationFiles(path=str(path)).count()
    path.write_text('{"text": "a"}\n')
    with pytest.raises(TreadleError, match="row 0: TextFormat gives a Text, but a Chat is needed"):
        ConversationFiles(path=str(path)).count()
    path.write_text('{"instruction": "a", "output": "b"}\n')
    held = HeldOutConversations(of=ConversationFiles(path=str(path), format=AlpacaFormat()))
    with pytest.raises(TreadleError, match="no conversation is in the validation part"):
        held.count()


def test_records_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    records = open_records(str(path), None, Text, parts=LeakFreeSplit(validation=0, test=0))
    assert [len(records[p]) for p in Part] == [1, 0, 0]
    assert records[Part.TRAIN][0] == Text("one\ntwo\n")


def test_a_spool_reads_while_it_grows() -> None:
    spool = Spool()
    for i in range(100):
        spool.append({"i": i, "é": "x" * i})
        assert spool[i // 2] == {"i": i // 2, "é": "x" * (i // 2)}
    assert len(spool) == 100
