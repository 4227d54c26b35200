"""WikiText against lm-eval's own task file: rolling windows, words, bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from evals.lm_eval_oracle import TASKS, lm_eval_samples, tiny

from treadle.core.errors import FileFormatError
from treadle.evals.harness import evaluate
from treadle.evals.perplexity import windows
from treadle.evals.rows import Examples
from treadle.evals.wikitext import WikiText, articles, plain
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer


def test_matches_lm_eval(shared_data: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", context=64, scale=2.0)
    file = Examples(path=str(shared_data / "lm/wikitext2_test.txt.gz"))
    pages = articles("".join(row["text"] for row in file.open()))
    assert len(pages) == 62
    odd = [" odd ( page ) : N = = 's '  \n", " x ", "a @-@ b ; ; c , ' d ' \" e \" ' [ f ]"]
    rows = [{"page": page[:3000]} for page in pages[:4]] + [{"page": page} for page in odd]
    theirs = lm_eval_samples(
        model.lm, {"include": str(TASKS / "wikitext/wikitext.yaml")}, {"test": rows}, tmp_path
    )
    task = WikiText(rows=Examples(path=str(tmp_path / "test.jsonl")))
    loaded, tokenizer = load_model(model.folder).model, Tokenizer.load(model.folder)
    result = evaluate(loaded, tokenizer, [task], records=tmp_path / "records", tokens=700)
    records = Examples(path=str(next((tmp_path / "records").rglob("*.jsonl")))).take()
    by_index = {record["index"]: record["metrics"] for record in records}
    total = words = size = 0.0
    for other in theirs:
        ours = by_index[other["doc_id"]]
        found, counted = other["word_perplexity"]
        assert ours["log_likelihood"] == pytest.approx(found, rel=1e-5)
        assert (ours["words"], ours["bytes"]) == (counted, other["byte_perplexity"][1])
        total, words, size = total + found, words + counted, size + ours["bytes"]
    scores = result.tasks["wikitext"].scores
    assert scores["word_perplexity"]["value"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert scores["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert scores["bits_per_byte"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    for figure in scores.values():
        assert figure["low"] < figure["value"] < figure["high"]


@pytest.mark.parametrize(
    ("length", "size", "overlap"),
    [(1, 4, 1), (4, 4, 1), (11, 4, 1), (11, 4, 3), (23, 7, 7), (9, 8, 4)],
)
def test_windows_cover_each_token_once(length: int, size: int, overlap: int) -> None:
    tokens = list(range(100, 100 + length))
    predicted: list[int] = []
    for number, window in enumerate(windows(0, tokens, size, overlap)):
        assert len(window.tokens) - 1 <= size
        assert window.start >= (1 if number == 0 else overlap)
        predicted += window.tokens[window.start :]
    assert predicted == tokens


def test_a_row_without_text_is_refused() -> None:
    with pytest.raises(
        FileFormatError, match="`wikitext` cannot read a row with the fields prompt"
    ):
        WikiText(rows=Examples(path="unused.txt")).documents([{"prompt": "?"}])


def test_plain_english() -> None:
    stored = "He , 's 12 @,@ 000 @-@ strong ( or so ) . \n Then"
    assert plain(stored) == "He,'s 12,000-strong (or so).\nThen"
