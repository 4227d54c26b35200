"""Predictions of two tokenizers are paired where both have read the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import END, byte_tokenizer, tiny_model
from tiny_teachers import Lines, TinyTeacher, env, workspace
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from treadle.core.errors import TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.corpus import TextCorpus
from treadle.distillation.other_tokenizer import OtherTokenizer, reread
from treadle.distillation.taught import Live, Taught
from treadle.models.source import ModelSource, Opened
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.ranked_labels import RankedLabels
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE


def merged_tokenizer() -> Tokenizer:
    return ByteLevelBPE(vocab_size=320)(text.text for text in Lines().training())


class Merging(ModelSource):
    """A teacher whose tokens are whole pieces of words."""

    context: int = 128

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.root / "merging"
        tokenizer = merged_tokenizer()
        tokenizer.save(folder)
        config = tiny_model(None, None, seed=4).config
        torch.manual_seed(8)
        return Opened(
            config.replace(vocab=tokenizer.vocab_size, context=self.context).build(), folder
        )


def taught_by(lesson, teacher: ModelSource | None = None) -> Taught:
    text = TextCorpus(documents=Lines(), context=32, tokens_per_step=128, tokens=64)
    return Taught(source=text, teacher=teacher or Merging(), lesson=lesson)


@pytest.mark.parametrize("text", ["the number after 3 is 4.", "größer — the number", "a\n\nthe"])
def test_tokens_meet_at_bytes(text: str) -> None:
    ours, theirs = byte_tokenizer(), merged_tokenizer()
    tokens = ours.encode(text)
    read, places = reread(ours, theirs, tokens)
    assert len(read) < len(tokens)
    met = [(i, place) for i, place in enumerate(places) if place >= 0]
    assert [place for _, place in met] == list(range(len(read)))
    for i, place in met:
        assert ours.decode_bytes(tokens[:i]) == theirs.decode_bytes(read[:place])
    back, again = reread(theirs, ours, read)
    assert back == tokens
    assert [again[place] for _, place in met] == [i for i, _ in met]


def spaced_tokenizer() -> Tokenizer:
    """Like Llama 2's: a space is put before a text, so that its first word is like others."""
    backend = Backend(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"])
    backend.train_from_iterator((text.text for text in Lines().training()), trainer)
    return Tokenizer(backend)


def test_a_space_before_the_text_moves_nothing() -> None:
    """What both have read at a pair is the same text; the space apart, which one adds."""
    ours, theirs = byte_tokenizer(), spaced_tokenizer()
    tokens = ours.encode("line 3: the number after 3 is 4.")
    read, places = reread(ours, theirs, tokens)
    assert theirs.decode_bytes(read) == b" line 3: the number after 3 is 4."
    met = [(i, place) for i, place in enumerate(places) if place >= 0]
    assert [place for _, place in met] == list(range(len(read)))
    for i, place in met[1:]:
        assert b" " + ours.decode_bytes(tokens[:i]) == theirs.decode_bytes(read[:place])


def test_special_tokens_are_read_as_such() -> None:
    """`<end>` is one token to whoever has it, and letters to others; each side of it meets."""
    ours, without = byte_tokenizer(), merged_tokenizer()
    having = merged_tokenizer()
    having.backend.add_special_tokens(["<end>"])
    having = Tokenizer(having.backend, special=having.special)
    tokens = [*ours.encode("the number"), END, END, *ours.encode("after 3")]
    read, places = reread(ours, having, tokens)
    end = having.token_id("<end>")
    assert read.count(end) == 2
    for i in (10, 11):
        assert read[places[i]] == end
    assert having.decode_bytes(read[places[12] :]) == b"after 3"
    read, places = reread(ours, without, tokens)
    assert without.decode_bytes(read) == b"the number<end><end>after 3"
    for i in (10, 11, 12):
        assert without.decode_bytes(read[: places[i]]) == ours.decode_bytes(tokens[:i])


def test_pairs_follow_the_same_text(tmp_path: Path) -> None:
    """Each pair's probabilities are those of the teacher run by hand on the text before it."""
    work = workspace(tmp_path)
    opened = Merging().open(work)
    teacher, theirs = opened.model.eval(), Tokenizer.load(opened.origin)
    given = env(tmp_path)
    torch.manual_seed(8)
    batch = next(taught_by(OtherTokenizer(ranks=9)).open(given)).batches[0]
    assert 5 < len(batch.ranked_rows) < len(batch.targets)
    for n in range(0, len(batch.ranked_rows), 7):
        row = int(batch.ranked_rows[n])
        segment = int(batch.sequences[row])
        start = batch.layout.starts[segment]
        before = batch.tokens[start : int(batch.sources[row]) + 1].tolist()
        read = theirs.encode_bytes(given.tokenizer.decode_bytes(before))
        with torch.no_grad():
            logp = teacher.logits(teacher(torch.tensor(read)))[-1].log_softmax(-1)
        expected = logp.sort(descending=True).values[:9]
        torch.testing.assert_close(batch.ranked_logprobs[n], expected, atol=1e-4, rtol=1e-4)


def test_more_ranks_than_there_are_tokens(tmp_path: Path) -> None:
    """The last one is what is left."""
    batch = next(taught_by(OtherTokenizer(ranks=10**4)).open(env(tmp_path))).batches[0]
    assert batch.ranked_logprobs.shape[1] == merged_tokenizer().vocab_size - 1


def test_student_learns_how_sure_its_teacher_is(tmp_path: Path) -> None:
    given = env(tmp_path)
    stream = taught_by(OtherTokenizer(ranks=16)).open(given)
    batch = next(stream).batches[0]
    objective = Distil(terms=(HardLabels(weight=0.1), RankedLabels()))
    optimizer = torch.optim.Adam(given.model.parameters(), lr=3e-3)
    distances = []
    for _ in range(25):
        output = objective(given.model, batch)
        (output.total / output.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        distances.append(float(output.metrics["ranked_labels"]))
    assert distances[-1] < 0.7 * distances[0]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=r"vocabulary of its own.*OtherTokenizer.*RankedLabels"):
        next(taught_by(Live()).open(env(tmp_path)))
    with pytest.raises(TreadleError, match=r"context\s+is 4"):
        next(taught_by(OtherTokenizer(), Merging(context=4)).open(env(tmp_path)))
    same = next(taught_by(OtherTokenizer(), TinyTeacher()).open(env(tmp_path))).batches[0]
    assert len(same.ranked_rows) == len(same.targets)  # with one tokenizer, every prediction
