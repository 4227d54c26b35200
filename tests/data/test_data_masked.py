"""Masked text: how much is hidden and how, whole words, the same choice again after a restart."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from tiny_readers import framed_tokenizer, tiny_encoder
from tokenizers.processors import TemplateProcessing

from treadle.core.errors import TreadleError
from treadle.data.documents import Documents
from treadle.data.masked import Choice, EachToken, MaskedStream, MaskedTexts, WholeWords
from treadle.data.records import Text
from treadle.data.source import Env
from treadle.models.bert import bert
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer

SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = ("loom", "##ing", "##s", "warp", "weft", "##ed", "thread", "red")
VOCAB = {piece: i for i, piece in enumerate((*SPECIAL, *PIECES))}
MASK = VOCAB["[MASK]"]
STEMS, ENDS = ("loom", "warp", "weft", "thread", "red"), ("", "ing", "s", "ed", "ings")


class Woven(Documents):
    """Words of one, two or three tokens."""

    count: int = 60

    def training(self) -> Iterator[Text]:
        chooser = random.Random(0)
        for _ in range(self.count):
            words = [chooser.choice(STEMS) + chooser.choice(ENDS) for _ in range(40)]
            yield Text(" ".join(words))

    def held_out(self) -> Iterator[Text]:
        return iter(())


def tokenizer() -> Tokenizer:
    model = tokenizers.models.WordPiece(VOCAB, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, VOCAB[t]) for t in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend)


def model() -> DecoderModel:
    return bert(dim=16, layers=1, heads=2, vocab=len(VOCAB), context=64).build()


def opened(source: MaskedTexts, folder: Path, *, rank: int = 0, world: int = 1) -> MaskedStream:
    env = Env(model=model(), tokenizer=tokenizer(), scratch=folder, seed=3, rank=rank, world=world)
    return source.open(env)


@pytest.mark.parametrize("choice", [EachToken(share=0.25), WholeWords(share=0.25)])
def test_statistics_are_those_of_the_paper(choice: Choice, tmp_path: Path) -> None:
    source = MaskedTexts(documents=Woven(), choice=choice, longest=34, per_step=20, tokens=700)
    stream = opened(source, tmp_path)
    fates: Counter[str] = Counter()
    tokens = 0
    for _ in range(40):
        for batch in next(stream).batches:
            shown, true = batch.tokens[batch.sources], batch.targets
            hidden, same = shown == MASK, shown == true
            fates["masked"] += int((hidden & ~same).sum())
            fates["kept"] += int(same.sum())
            fates["swapped"] += int((~hidden & ~same).sum())
            tokens += len(batch.tokens) - 2 * len(batch.layout.lengths)
            assert (batch.tokens == MASK).sum() == hidden.sum()  # nothing else is hidden
            assert batch.weights.tolist() == [1.0] * len(true)
    chosen = sum(fates.values())
    assert chosen / tokens == pytest.approx(0.25, abs=0.03)
    # Of the tokens drawn in the place of others 1 in 12 is the mask, and 1 in 12 the same.
    assert fates["masked"] / chosen == pytest.approx(0.8 + 0.1 / 12, abs=0.02)
    assert fates["swapped"] / chosen == pytest.approx(0.1 * 10 / 12, abs=0.02)
    assert fates["kept"] / chosen == pytest.approx(0.1 + 0.1 / 12, abs=0.02)


def test_words_are_hidden_whole() -> None:
    import numpy as np

    words = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5]
    halves = 0
    for seed in range(200):
        whole = WholeWords(share=0.3)(words, np.random.default_rng(seed))
        assert whole == sorted(set(whole))
        assert 3 <= len(whole) <= 5
        chosen = {words[place] for place in whole}
        assert [i for i, w in enumerate(words) if w in chosen] == whole
        each = EachToken(share=0.3)(words, np.random.default_rng(seed))
        assert len(set(each)) == 3
        halves += any(
            words.count(words[p]) > [words[q] for q in each].count(words[p]) for p in each
        )
    assert halves > 150
    assert len(EachToken(share=0.01)(words, np.random.default_rng(0))) == 1


def test_what_is_hidden_is_what_stood_there(tmp_path: Path) -> None:
    stream = opened(MaskedTexts(documents=Woven(), longest=20), tmp_path)
    stretch = stream.stretches[0]
    framed, hidden = stream.hide(stretch, (0, 0, 0))
    assert len(framed.ids) == 20
    assert (framed.ids[0], framed.ids[-1]) == (VOCAB["[CLS]"], VOCAB["[SEP]"])
    assert hidden == [stretch.ids[place - 1] for place in framed.places]
    untouched = set(range(18)) - {place - 1 for place in framed.places}
    assert all(framed.ids[i + 1] == stretch.ids[i] for i in untouched)
    again, _ = stream.hide(stretch, (0, 0, 0))
    other, _ = stream.hide(stretch, (1, 0, 0))
    assert again == framed
    assert other != framed
    text = stretch.ids + stream.stretches[1].ids
    first = next(iter(Woven().training())).text
    assert list(text) == tokenizer().encode(first)[: len(text)]


def test_resumed_equals_uninterrupted_and_ranks_share(tmp_path: Path) -> None:
    source = MaskedTexts(documents=Woven(count=3), longest=24, per_step=4)
    whole = opened(source, tmp_path)
    steps = [next(whole) for _ in range(6)]
    half = opened(source, tmp_path)
    for _ in range(2):
        next(half)
    resumed = opened(source, tmp_path)
    resumed.restore(half.state())
    for step in steps[2:]:
        for ours, theirs in zip(step.batches, next(resumed).batches, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.targets, theirs.targets)
    ranks = [next(opened(source, tmp_path, rank=r, world=2)).batches[0] for r in range(2)]
    together = sorted(t for batch in ranks for t in batch.targets.tolist())
    assert together == sorted(steps[0].batches[0].targets.tolist())


def test_mistakes_are_named(tmp_path: Path) -> None:
    documents = Woven()
    env = Env(model=tiny_encoder(), tokenizer=framed_tokenizer(), scratch=tmp_path)
    with pytest.raises(TreadleError, match=r"no token `\[MASK\]`.*source.mask"):
        MaskedTexts(documents=documents).open(env)
    with pytest.raises(TreadleError, match=r"masked=0.9 and swapped=0.2 are more than all"):
        opened(MaskedTexts(documents=documents, masked=0.9, swapped=0.2), tmp_path)
    with pytest.raises(TreadleError, match="no text to learn from"):
        opened(MaskedTexts(documents=Woven(count=0)), tmp_path)
