from __future__ import annotations

import csv
import gzip
import json
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from treadle.core.errors import FileFormatError
from treadle.data import read
from treadle.data.read import files_of, read_rows

ROWS = [{"text": f"line {i} é\n", "n": str(i)} for i in range(50)]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    if path.suffix == ".zst":
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv"])
def test_rows_come_back(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1))
    elif name.endswith("sv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter="," if "csv" in name else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS))
    path = write(tmp_path / (name + packed), path.read_bytes())
    assert list(read_rows(path)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": [1, 2], "m": {"b": None}}] * 600
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.html", "a.py.gz", "a.txt.zst"])
def test_texts(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "One\r\n\ntwo é\n\n\nthree\n".encode())
    assert list(read_rows(path)) == [{"text": "One\r\n\ntwo é\n\n\nthree\n"}]
    lines = [r["text"] for r in read_rows(path, separator="\n")]
    assert lines == ["One\r", "two é", "three"]


def test_long_texts_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST", 64)
    text = "".join(f"line {i}\n" for i in range(100)) + "x" * 200
    path = write(tmp_path / "a.txt", text.encode())
    rows = [r["text"] for r in read_rows(path)]
    assert "".join(rows) == text
    assert len(rows) > 10
    assert all(len(r) <= 64 for r in rows)
    assert all(r.endswith("\n") for r in rows[:10])
    documents = [r["text"] for r in read_rows(path, separator="\nline 7")]
    assert "".join(documents) == text.replace("\nline 7", "")


def test_small_windows_read_json_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST", 7)
    path = write(tmp_path / "a.json", json.dumps(ROWS, indent=3).encode())
    assert list(read_rows(path)) == ROWS
    assert list(read_rows(write(path, b" [ ] "))) == []
    assert list(read_rows(write(path, b'{"a": [1]}'))) == [{"a": [1]}]


def test_folders_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"2")
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "z.jsonl", b'{"text": "1"}')
    write(tmp_path / "c.bin", b"3")
    write(tmp_path / ".hidden.txt", b"4")
    assert [r["text"] for r in read_rows(tmp_path)] == ["1", "2"]
    assert [p.name for p in files_of(tmp_path)] == ["z.jsonl", "b.txt"]


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert list(read_rows(tmp_path / "one")) == ROWS
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert list(read_rows(tmp_path / "two", split="test")) == ROWS[:1]
    with pytest.raises(FileFormatError, match="no split `dev`; it has train, test"):
        list(read_rows(tmp_path / "two", split="dev"))


def test_a_hub_name_goes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((names, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("hf:owner/name", split="test", subset="en")) == ROWS
    assert asked == [(("owner/name", "en"), {"split": "test", "streaming": True})]


def test_real_files(shared_data: Path) -> None:
    """Rows as the shell counts them."""
    for name, count in (("sft/gsm8k_train.jsonl.gz", 7473), ("eval/blimp.jsonl.gz", 67000)):
        path = shared_data / name
        lines = subprocess.check_output(f"zcat '{path}' | wc -l", shell=True)
        assert sum(1 for _ in read_rows(path)) == count == int(lines)
    text = gzip.decompress((shared_data / "lm" / "tinyshakespeare.txt.gz").read_bytes()).decode()
    rows = read_rows(shared_data / "lm" / "tinyshakespeare.txt.gz")
    assert "".join(r["text"] for r in rows) == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_memory_stays_flat(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST", 1 << 16)

    def peak(count: int) -> int:
        rows = [{"text": f"{i} " + "x" * 400} for i in range(count)]
        path = tmp_path / name
        if name == "a.json":
            path.write_text(json.dumps(rows))
        elif name == "a.csv":
            path.write_text("text\n" + "\n".join(r["text"] for r in rows))
        elif name == "a.parquet":
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, path, row_group_size=500)
        else:
            write(path, "\n".join(json.dumps(r) for r in rows).encode())
        del rows
        tracemalloc.start()
        size = sum(len(r["text"]) for r in read_rows(path))
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size > count * 400
        return high

    small, large = peak(2_000), peak(20_000)
    assert large < small * 1.5 + 100_000
    assert large < 3_000_000 < 20_000 * 400


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a.jsonl:3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl:2: expected an object, found list"),
        ("a.jsonl", b'{"a": "\xff"}', r"a.jsonl: not UTF-8"),
        ("a.json", b'[{"a": 1}, {"a": ]', r"a.json: element 1: not valid JSON"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"a.json: element 1: not valid JSON: expected `,`"),
        ("a.json", b'[{"a": 1}', r"a.json: element 1: not valid JSON"),
        ("a.json", b"[1]", r"a.json: element 0: expected an object, found int"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a.csv:3: the header has 2 fields, this row not"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: the header has 2 fields, this row not"),
        ("a.csv", b'a,b\n"1,2\n', r"a.csv:2: unexpected end of data"),
        ("a.parquet", b"PAR1 no", r"a.parquet: not a whole Parquet file"),
        (
            "a.txt.gz",
            gzip.compress(b"abc" * 999, mtime=0)[:-9],
            r"a.txt.gz: cannot be read; damaged",
        ),
        ("a.txt.gz", b"abc", r"a.txt.gz: cannot be read; damaged"),
        (
            "a.txt.zst",
            pyarrow.compress(b"abc" * 999, codec="zstd", asbytes=True)[:-5],
            r"a.txt.zst: cannot be read; damaged",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file or folder; write hf:owner/name"):
        read_rows(tmp_path / "absent.txt")
    with pytest.raises(FileFormatError, match="no file that can be read; known endings"):
        list(read_rows(tmp_path))
