from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.data.corpus import PackedDocuments, Rows, TextCorpus, Windows
from treadle.data.documents import Documents
from treadle.data.pack import TruncateLong
from treadle.data.records import Text
from treadle.data.source import Env, Source
from treadle.data.split import LeakFreeSplit, Part
from treadle.data.texts import TextFiles
from treadle.models.decoder import Decoder
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

WORDS = "loom weft warp shuttle treadle heddle reed beam cloth yarn".split()  # noqa: SIM905


class Weavings(Documents):
    """Forty short texts, no two alike."""

    def training(self) -> Iterator[Text]:
        for i in range(40):
            yield Text(" ".join(WORDS[(i * k) % 10] for k in range(1, 3 + i)) + f" {i}")

    def held_out(self) -> Iterator[Text]:
        yield Text("nothing")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ByteLevelBPE(vocab_size=300)(t.text for t in Weavings().training())


@pytest.fixture
def env(tokenizer: Tokenizer, tmp_path: Path) -> Env:
    block = Block(mixer=Attention(heads=1), ffn=GatedMLP(hidden=4))
    model = Decoder(vocab=300, dim=4, context=32, blocks=(block,)).build()
    return Env(model=model, tokenizer=tokenizer, scratch=tmp_path / "scratch", seed=3)


def corpus(rows: Rows | None = None, **changes: int) -> TextCorpus:
    sizes = {"context": 16, "tokens_per_step": 48, "tokens": 40} | changes
    return TextCorpus(documents=Weavings(), rows=rows or Windows(), **sizes)


def documents(tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(t.text), tokenizer.eos_id] for t in Weavings().training()]


def predictions(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    """Every (context, target), the context from the beginning of its segment."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        tokens = batch.tokens.tolist()
        starts = batch.layout.starts
        pairs = zip(batch.sources.tolist(), batch.targets.tolist(), strict=True)
        for source, target in pairs:
            start = max(s for s in starts if s <= source)
            found[(*tokens[start : source + 1], target)] += 1
    return found


def epoch(source: TextCorpus, env: Env) -> list[Batch]:
    """All batches of the first epoch, whose rows must fall into whole steps."""
    stream = source.open(env)
    rows = stream.state()["rows"]
    per_step = source.tokens_per_step // source.context
    assert rows % per_step == 0, f"{rows} rows: choose another tokens_per_step for this test"
    return [b for _ in range(rows // per_step) for b in next(stream).batches]


def test_windows_predict_each_token_once(env: Env) -> None:
    stream = [i for d in documents(env.tokenizer) for i in d]
    expected: Counter[tuple[int, ...]] = Counter()
    for start in range(0, len(stream) - 1, 15):
        window = stream[start : start + 16]
        expected.update(tuple(window[: i + 1]) for i in range(1, len(window)))
    batches = epoch(corpus(tokens_per_step=16), env)
    assert predictions(batches) == expected
    assert sum(expected.values()) == len(stream) - 1


def test_packed_documents_predict_each_token_once_and_see_only_their_own(env: Env) -> None:
    expected: Counter[tuple[int, ...]] = Counter()
    for document in documents(env.tokenizer):
        for start in range(0, max(len(document) - 1, 1), 15):
            part = document[start : start + 16]
            expected.update(tuple(part[: i + 1]) for i in range(1, len(part)))
    batches = epoch(corpus(PackedDocuments(), tokens_per_step=16), env)
    assert predictions(batches) == expected
    assert sum(expected.values()) == sum(len(d) - 1 for d in documents(env.tokenizer))
    rows = sum(b.tokens.numel() for b in batches) / 16
    assert rows > 0.95 * len(batches)

    cut = epoch(corpus(PackedDocuments(overlong=TruncateLong()), tokens_per_step=16), env)
    expected = Counter()
    for document in documents(env.tokenizer):
        expected.update(tuple(document[: i + 1]) for i in range(1, min(len(document), 16)))
    assert predictions(cut) == expected


@pytest.mark.parametrize("rows", [Windows(), PackedDocuments()])
def test_resumed_equals_uninterrupted(env: Env, rows: Rows) -> None:
    def told(stream, count: int) -> list[list[int]]:
        return [b.tokens.tolist() for _ in range(count) for b in next(stream).batches]

    whole = corpus(rows).open(env)
    told(whole, 70)
    state = json.loads(json.dumps(whole.state()))
    rest = told(whole, 30)
    again = corpus(rows).open(env)
    again.restore(state)
    assert told(again, 30) == rest
    assert again.state() == whole.state()
    assert state["epoch"] > 0


def test_ranks_take_what_one_takes(env: Env) -> None:
    alone = next(corpus(tokens_per_step=96).open(env))
    shares = [
        next(corpus(tokens_per_step=96).open(Env(**{**vars(env), "rank": r, "world": 2})))
        for r in range(2)
    ]
    together = [b for share in shares for b in share.batches]
    assert predictions(together) == predictions(list(alone.batches))
    assert all(sum(b.tokens.numel() for b in s.batches) == 48 for s in shares)


def test_micro_batches_keep_to_their_budget(env: Env) -> None:
    work = next(corpus(tokens_per_step=160, tokens=40).open(env))
    assert [b.tokens.numel() for b in work.batches] == [32] * 5
    assert work.metrics["epoch"] == 0.0


def test_another_seed_is_another_order(env: Env) -> None:
    other = Env(**{**vars(env), "seed": 4})
    assert [b.tokens.tolist() for b in epoch(corpus(tokens_per_step=16), env)] != [
        b.tokens.tolist() for b in epoch(corpus(tokens_per_step=16), other)
    ]


def test_tokens_are_made_once(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus().open(env)

    def gone(self: Documents) -> Iterator[Text]:
        raise AssertionError("read again")

    monkeypatch.setattr(Weavings, "training", gone)
    corpus(PackedDocuments()).open(env)


def test_mistakes_are_named(env: Env) -> None:
    with pytest.raises(TreadleError, match=r"that is 1 rows of 16 for 2 processes.*at least 32"):
        corpus(tokens_per_step=31).open(Env(**{**vars(env), "world": 2}))
    state = corpus().open(env).state()
    with pytest.raises(TreadleError, match="have changed since this run was saved"):
        corpus(context=8).open(env).restore(state)
    nameless = env.tokenizer.with_special()
    nameless.special = nameless.special.__class__()
    with pytest.raises(TreadleError, match="no end-of-text token"):
        corpus().open(Env(**{**vars(env), "tokenizer": nameless}))


def test_config_round_trip() -> None:
    source = TextCorpus(
        documents=TextFiles(path="a.txt", separator="\n\n"),
        context=128,
        tokens_per_step=4096,
        rows=PackedDocuments(),
    )
    assert from_yaml(to_yaml(source), expect=Source) == source


def test_text_files_keep_parts_apart(shared_data: Path, env: Env) -> None:
    split = LeakFreeSplit(validation=0.1, test=0.1)
    path = str(shared_data / "lm" / "tinyshakespeare.txt.gz")
    files = TextFiles(path=path, separator="\n\n", parts=split)
    parts = {part: [d.text for d in files.part(part)] for part in Part}
    assert [d.text for d in files.training()] == parts[Part.TRAIN]
    assert [d.text for d in files.held_out()] == parts[Part.VALIDATION]
    assert len(parts[Part.TRAIN]) > 5000
    assert sum(map(len, parts.values())) == 7222
    shared = set(parts[Part.TRAIN]) & set(parts[Part.VALIDATION] + parts[Part.TEST])
    assert shared == set()

    stream = TextCorpus(documents=files, context=64, tokens_per_step=256).open(env)
    text = env.tokenizer.decode(stream.array.slice(0, 10**7))
    assert all(t in text for t in parts[Part.TRAIN][:50])
    long = [t for t in parts[Part.VALIDATION] if len(t) > 200]
    assert long
    assert not any(t in text for t in long)


def test_text_files_name_an_empty_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    files = TextFiles(path=str(tmp_path / "a.txt"), parts=LeakFreeSplit(validation=0, test=0))
    assert [d.text for d in files.training()] == ["one document"]
    with pytest.raises(TreadleError, match="of 1 documents none is in the validation part; raise"):
        files.held_out()
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(TreadleError, match="row 0: key `text` is missing"):
        TextFiles(path=str(tmp_path / "a.jsonl")).training()
