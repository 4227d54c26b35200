"""Rows out of files, folders and Hugging Face data sets, one at a time.

| name ends in | rows |
|---|---|
| `.jsonl`, `.ndjson` | one object a line |
| `.json` | the objects of an array, or the one object |
| `.parquet`, `.csv`, `.tsv` | rows by column name |
| `.txt`, `.md`, `.rst`, `.html`, `.py` and other text | `{"text": ...}` |
| any of these with `.gz` or `.zst` | the same |
| a folder | all of its files, in the order of their names |
| a folder written by `datasets.save_to_disk` | its rows |
| `hf:owner/name` | the rows of a data set on the hub, streamed |

Nothing is read whole but a row: a long text is cut at line ends.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from treadle.core.errors import FileFormatError, TreadleError

Row = dict[str, Any]

TEXT = frozenset((".txt", ".md", ".rst", ".html", ".htm", ".py", ".c", ".cpp", ".js", ".tex"))
ROWS = frozenset((".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"))
PACKED = frozenset((".gz", ".zst"))
LONGEST = 1 << 20
"""A text of more characters than this comes as several rows, cut at line ends."""
HUGE = 1 << 26
"""Most characters of one element of a JSON array."""

_FIRST, _NEXT = re.compile(r"\s*"), re.compile(r"\s*,\s*|\s*(?=\])")


def read_rows(
    path: str | Path, *, split: str = "train", subset: str | None = None, separator: str = ""
) -> Iterator[Row]:
    """Rows of a file, a folder or a data set; see the table above.

    Args:
        split: which split of a Hugging Face data set.
        subset: which configuration of a data set on the hub.
        separator: what divides the documents of text files: `"\\n"` makes each line a row; if
            empty, a file is one document.

    Raises:
        FileFormatError: names the file and, where it has lines, the line.
    """
    name = str(path)
    if name.startswith("hf:"):
        return _hub(name.removeprefix("hf:"), split, subset)
    path = Path(path)
    if not path.exists():
        raise FileFormatError(
            f"{path}: no such file or folder; write hf:owner/name for a data set on the hub"
        )
    if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    return (row for file in files_of(path) for row in _rows(file, separator))


def files_of(path: str | Path) -> list[Path]:
    """The files below a folder that can be read, in the order of their names.

    Raises:
        FileFormatError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(
        f
        for f in path.rglob("*")
        if f.is_file()
        and kind_of(f) in TEXT | ROWS
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    if not found:
        known = " ".join(sorted(TEXT | ROWS))
        raise FileFormatError(f"{path}: no file that can be read; known endings: {known}")
    return found


def kind_of(path: Path) -> str:
    """The ending that tells the format, `.gz` and `.zst` aside."""
    return Path(path.stem if path.suffix in PACKED else path.name).suffix.lower()


def _rows(path: Path, separator: str) -> Iterator[Row]:
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if kind == ".json":
        return _json(path)
    if kind in (".csv", ".tsv"):
        return _table(path, "\t" if kind == ".tsv" else ",")
    return _texts(path, separator)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The file as UTF-8 text, unpacked; damage is named with the file."""
    try:
        with _unpacked(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as out:
            yield out
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: not UTF-8: {error}") from None
    except (EOFError, zlib.error, OSError) as error:
        raise FileFormatError(f"{path}: cannot be read; damaged or cut short: {error}") from None


def _unpacked(path: Path) -> Any:
    """A stream of bytes."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return _pyarrow(".zst files").input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _json_lines(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(line, f"{path}:{number}")


def _object(text: str, where: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FileFormatError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _json(path: Path) -> Iterator[Row]:
    """The objects of an array, decoded one by one from a window that moves over the file."""
    with _opened(path) as file:
        window = file.read(LONGEST).lstrip()
        if not window.startswith("["):
            yield _object(window + file.read(), str(path))
            return
        decoder, at, index = json.JSONDecoder(), 1, 0
        while True:
            gap = (_NEXT if index else _FIRST).match(window, at)
            if gap and window.startswith("]", gap.end()):
                return
            try:
                if gap is None:
                    raise ValueError("expected `,` or `]`")
                value, end = decoder.raw_decode(window, gap.end())
            except ValueError as error:
                more = file.read(max(LONGEST, len(window))) if len(window) - at < HUGE else ""
                if not more:
                    problem = f"element {index}: not valid JSON: {error}"
                    raise FileFormatError(f"{path}: {problem}") from None
                window, at = window[at:] + more, 0
                continue
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise FileFormatError(f"{path}: element {index}: expected an object, found {kind}")
            yield value
            at, index = end, index + 1


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(HUGE)  # 131072 by default, less than a long document
    with _opened(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    count = len(reader.fieldnames or ())
                    raise FileFormatError(
                        f"{path}:{reader.line_num}: the header has {count} fields, this row not"
                    )
                yield row
        except csv.Error as error:
            raise FileFormatError(f"{path}:{reader.reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow("Parquet files")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"{path}: not a whole Parquet file: {error}") from None


def _texts(path: Path, separator: str) -> Iterator[Row]:
    """Documents of a text file: between separators, none longer than LONGEST."""
    with _opened(path) as file:
        held = ""
        while piece := file.read(LONGEST):
            documents = (held + piece).split(separator) if separator else [held + piece]
            held = documents.pop()
            yield from ({"text": d} for d in documents if d.strip())
            while len(held) > LONGEST:
                cut = held.rfind("\n", 0, LONGEST) + 1 or LONGEST
                yield {"text": held[:cut]}
                held = held[cut:]
        if held.strip():
            yield {"text": held}


def _saved(path: Path, split: str) -> Iterator[Row]:
    datasets = _datasets()
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise FileFormatError(f"{path}: no split `{split}`; it has {', '.join(data)}")
        data = data[split]
    yield from data


def _hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    datasets = _datasets()
    try:
        data = datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds
        raise TreadleError(f"hf:{name} (split {split}): cannot be opened: {error}") from None
    yield from data


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing("datasets", "Hugging Face data sets") from None
    return datasets


def _pyarrow(what: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise _missing("pyarrow", what) from None
    return pyarrow


def _missing(package: str, what: str) -> TreadleError:
    return TreadleError(f"{what} need {package}: pip install 'treadle[data]'")
