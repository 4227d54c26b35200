"""Labelled texts as batches: frames, labels, weights, places of words, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.utils.class_weight import compute_class_weight
from tiny_readers import (
    VOCAB,
    WORDS,
    environment,
    framed_tokenizer,
    open_tokenizer,
    tiny_decoder,
    tiny_encoder,
    write_rows,
)

from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.framing import Framer, laid
from treadle.data.labelled import Balanced, ClassTexts, RatedTexts, TaggedTexts, TaskFiles
from treadle.data.matches import Matches, RatedPairs, left_out
from treadle.data.split import LeakFreeSplit
from treadle.data.task_formats import ClassFormat, MatchFormat, RatedFormat, TagFormat
from treadle.models.heads import ClassHead, NumberHead, TokenHead
from treadle.tokenizers.tokenizer import Tokenizer

ALL = LeakFreeSplit(validation=0, test=0)
LABELS = ("cool", "hot")


def files(path: str, format: Any) -> TaskFiles:
    return TaskFiles(path=path, format=format, parts=ALL)


def test_frames_are_those_of_transformers(minilm: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    framer = Framer(Tokenizer.load(minilm), longest=12)
    long = "an unusually long sentence about weaving, with commas, and more of everything"
    for pair in (("a loom", None), (long, None), ("a loom", "warm thread"), (long, long)):
        wanted = theirs(*pair, truncation=True, max_length=12)
        found = framer.text(*pair)
        assert list(found.ids) == wanted["input_ids"], pair
        assert list(found.types) == wanted["token_type_ids"], pair


def test_word_places_are_those_of_transformers(minilm: Path, shared_data: Path) -> None:
    """The first token of each word, on real tweets, up to where the text is cut off."""
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    framer = Framer(Tokenizer.load(minilm), longest=24)
    with gzip.open(shared_data / "sft" / "wnut17_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["tokens"] for line in file][:200]
    for words in rows:
        wanted = theirs(words, is_split_into_words=True, truncation=True, max_length=24)
        ids = wanted.word_ids()
        firsts = [ids.index(w) for w in sorted({w for w in ids if w is not None})]
        found = framer.words(words)
        assert list(found.ids) == wanted["input_ids"], words
        assert list(found.places) == firsts, words


def test_without_a_frame_a_text_ends_in_its_end_token() -> None:
    framer = Framer(open_tokenizer(), longest=6)
    end, joint = VOCAB["[SEP]"], tuple(open_tokenizer().encode("\n"))
    warm, cold = VOCAB["warm"], VOCAB["cold"]
    assert framer.text("warm").ids == (warm, end)
    assert framer.text("warm warm", "cold").ids == (warm, warm, *joint, cold, end)
    assert framer.text("warm", "cold").types == (0,) * (3 + len(joint))
    assert framer.text("warm " * 9).ids == (*(warm,) * 5, end)
    assert framer.words(["red", "loom"]).places == (0, 1)


def test_frames_need_room_and_text() -> None:
    framer = Framer(framed_tokenizer(), longest=3)
    with pytest.raises(TreadleError, match="longest=3 leaves no room beside 3 special tokens"):
        framer.text("warm", "cold")
    with pytest.raises(TreadleError, match="a text is empty"):
        framer.text("warm", "  ")
    with pytest.raises(TreadleError, match="a word is empty"):
        framer.words(["warm", ""])


def test_classes_carry_their_labels_and_weights(tmp_path: Path) -> None:
    rows = [{"text": w, "label": "hot" if w == "warm" else 0} for w in WORDS]
    texts = files(write_rows(tmp_path / "a.jsonl", rows), ClassFormat())
    env = environment(ClassHead(labels=LABELS)(tiny_encoder()), tmp_path)
    stream = ClassTexts(texts=texts, per_step=len(rows), balance=Balanced()).open(env)
    batch = next(stream).batches[0]
    words = [int(batch.tokens[s + 1]) for s in batch.layout.starts]
    assert batch.targets.tolist() == [int(w == VOCAB["warm"]) for w in words]
    numbers = [int(r["label"] == "hot") for r in rows]
    cool, hot = compute_class_weight("balanced", classes=np.array([0, 1]), y=numbers)
    expected = torch.tensor([hot if t else cool for t in batch.targets], dtype=torch.float32)
    torch.testing.assert_close(batch.weights, expected)


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = [{"text": f"{a} {b}", "label": i % 2} for i, a in enumerate(WORDS) for b in WORDS]
    texts = files(write_rows(tmp_path / "a.jsonl", rows), ClassFormat())
    env = environment(ClassHead(labels=LABELS)(tiny_encoder()), tmp_path)
    source = ClassTexts(texts=texts, per_step=7, tokens=12)
    first = source.open(env)
    next(first)
    state, expected = first.state(), next(first)
    again = source.open(env)
    again.restore(state)
    found = next(again)
    assert len(found.batches) == len(expected.batches) == 3  # of 4 tokens, 3 to a micro-batch
    for a, b in zip(found.batches, expected.batches, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)


def test_word_labels_stand_at_the_first_tokens(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["old", "loom"], "tags": ["cool", "hot"]},
        {"tokens": ["red"] * 9, "tags": ["hot"] * 9},
    ]
    texts = files(write_rows(tmp_path / "a.jsonl", rows), TagFormat())
    env = environment(TokenHead(labels=LABELS)(tiny_encoder()), tmp_path)
    batch = next(TaggedTexts(texts=texts, per_step=2, longest=8).open(env)).batches[0]
    at = batch.tokens[batch.sources]
    assert sorted(zip(at.tolist(), batch.targets.tolist(), strict=True)) == sorted(
        [(VOCAB["old"], 0), (VOCAB["loom"], 1), *[(VOCAB["red"], 1)] * 6]
    )


def test_pairs_have_types_and_numbers(tmp_path: Path) -> None:
    rows = [{"text": "warm", "second": "cold", "score": 0.25}]
    texts = files(write_rows(tmp_path / "a.jsonl", rows), RatedFormat(second="second"))
    env = environment(NumberHead()(tiny_encoder()), tmp_path)
    batch = next(RatedTexts(texts=texts, per_step=1).open(env)).batches[0]
    assert batch.types is not None
    assert batch.types.tolist() == [0, 0, 0, 1, 1]
    assert batch.context().types is batch.types
    assert batch.values.tolist() == [0.25]
    apart = next(RatedPairs(texts=texts, per_step=1).open(env)).batches[0]
    assert apart.layout.lengths == (3, 3)


def test_matches_lie_by_column_and_know_false_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "warm", "positive": "red", "negatives": ["old"]},
        {"query": "cold", "positive": "blue", "negatives": ["red"]},
        {"query": "warm", "positive": "good", "negatives": ["bad"]},
    ]
    expected = [  # columns: red blue good | old red bad
        [False, False, True, False, True, False],  # good answers `warm` too; `red` is its own text
        [False, False, False, False, False, False],
        [True, False, False, False, False, False],
    ]
    texts = [[r["query"], r["positive"], *r["negatives"]] for r in rows]
    assert left_out(texts).tolist() == expected
    env = environment(tiny_encoder(), tmp_path)
    source = files(write_rows(tmp_path / "a.jsonl", rows), MatchFormat())
    batch = next(Matches(texts=source, per_step=3, negatives=1).open(env)).batches[0]
    heads = [int(batch.tokens[s + 1]) for s in batch.layout.starts]
    names = {v: k for k, v in VOCAB.items()}
    lying = [names[h] for h in heads]
    assert batch.queries == 3
    assert {lying[i]: lying[i + 3] for i in range(3) if lying[i] == "cold"} == {"cold": "blue"}
    assert sorted(lying[3:6]) == ["blue", "good", "red"]
    assert sorted(lying[6:]) == ["bad", "old", "red"]
    assert batch.left_out.sum() == 3


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        (ClassFormat(), {"text": "warm"}, "row 0: key `label`: expected the name or the number"),
        (ClassFormat(), {"text": " ", "label": 0}, "key `text` is empty"),
        (ClassFormat(second="b"), {"text": "warm", "label": 0}, "key `b` is missing"),
        (TagFormat(), {"tokens": ["a"], "tags": []}, "one label for each of 1 words, found 0"),
        (TagFormat(), {"tokens": "a", "tags": ["O"]}, "key `tokens`: expected a list of words"),
        (RatedFormat(), {"text": "a", "score": "high"}, "expected a finite number"),
        (MatchFormat(), {"query": "a", "positive": "b", "negatives": [1]}, "expected texts"),
    ],
)
def test_rows_that_are_not_of_the_format(
    format: Any, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    kinds = {ClassFormat: ClassTexts, TagFormat: TaggedTexts, RatedFormat: RatedTexts}
    source = kinds.get(type(format), Matches)(
        texts=files(write_rows(tmp_path / "a.jsonl", [row]), format)
    )
    model = ClassHead(labels=LABELS)(tiny_encoder())
    with pytest.raises(FileFormatError, match=said):
        source.open(environment(model, tmp_path))


def test_labels_and_heads_that_do_not_fit(tmp_path: Path) -> None:
    rows = [{"text": "warm", "label": 1}, {"text": "red loom", "label": 2}]
    source = ClassTexts(texts=files(write_rows(tmp_path / "a.jsonl", rows), ClassFormat()))
    with pytest.raises(TreadleError, match=r"a.jsonl: example 1: label 2 is out of range"):
        source.open(environment(ClassHead(labels=LABELS)(tiny_encoder()), tmp_path))
    with pytest.raises(TreadleError, match="no head for a task"):
        source.open(environment(tiny_decoder(), tmp_path))
    with pytest.raises(TreadleError, match="has no labels: add ClassHead"):
        source.open(environment(NumberHead()(tiny_decoder()), tmp_path))
    held = source.texts.replace(held_out=True)
    with pytest.raises(TreadleError, match="no example is in the validation part"):
        source.replace(texts=held).open(environment(tiny_encoder(), tmp_path))


def test_matches_that_teach_nothing(tmp_path: Path) -> None:
    rows = [{"query": "warm", "positive": "red"}, {"query": "cold", "positive": "blue"}]
    texts = files(write_rows(tmp_path / "a.jsonl", rows), MatchFormat())
    env = environment(tiny_encoder(), tmp_path)
    with pytest.raises(TreadleError, match="example 0 has 0 hard negatives, not the 1"):
        Matches(texts=texts, negatives=1).open(env)
    with pytest.raises(TreadleError, match=r"alone in its micro-batch.*raise `tokens`"):
        next(Matches(texts=texts, tokens=8, per_step=2).open(env))
    single = texts.replace(format=RatedFormat(text="query", score="positive"))
    write_rows(Path(texts.path), [{"query": "warm", "positive": 1.0}])
    with pytest.raises(TreadleError, match="is no pair: name the key of the second"):
        next(RatedPairs(texts=single).open(env))


def test_documents_of_a_batch_are_read_at_their_ends() -> None:
    framer = Framer(framed_tokenizer(), longest=9)
    batch = laid([framer.text("warm"), framer.text("red loom")])
    assert batch.sources.tolist() == [2, 6]
    assert batch.types is None
