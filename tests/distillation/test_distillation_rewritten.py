"""Text written by student and teacher: TRL's loss on it, greedy continuations, filters, resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_generation import END, tiny_model
from tiny_teachers import Lines, TinyTeacher, env, workspace

from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble
from treadle.data.corpus import TextCorpus
from treadle.data.source import Env, Source, Stream, Work
from treadle.distillation.rewritten import (
    ByStudent,
    ByTeacher,
    Rewritten,
    Writer,
    Written,
    sequences,
)
from treadle.distillation.taught import Live, Taught
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.objectives.distil import Distil
from treadle.objectives.divergence import JensenShannon
from treadle.objectives.soft_labels import SoftLabels

TEXT = TextCorpus(documents=Lines(), context=24, tokens_per_step=72, tokens=48)
GREEDY = Sampling(temperature=0.0, max_tokens=6)


def rewritten(writer: Writer = ByStudent(), **changes) -> Rewritten:
    return Rewritten(source=TEXT, writer=writer, prompt=5, **{"sampling": GREEDY, **changes})


def originals(tmp_path: Path) -> list[list[int]]:
    work = next(TEXT.open(env(tmp_path)))
    return [list(s.tokens) for batch in work.batches for s in sequences(batch)]


@torch.no_grad()
def greedy(model: DecoderModel, prompt: list[int], count: int = 6) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor(tokens))[-1]).argmax()))
        if tokens[-1] == END:
            break
    return tokens


def test_on_policy_matches_trl(tmp_path: Path) -> None:
    """The student's own greedy text, and TRL's GKD loss and gradients on its predictions."""
    trl = pytest.importorskip("trl.experimental.gkd")
    ours, theirs = tiny_model(), tiny_model()
    teacher = TinyTeacher().open(workspace(tmp_path)).model
    taught = Taught(source=rewritten(), teacher=TinyTeacher(), lesson=Live())
    work = next(taught.open(env(tmp_path, ours)))
    term = SoftLabels(divergence=JensenShannon(beta=0.4))
    outputs = [Distil(terms=(term,))(ours, batch) for batch in work.batches]
    loss = sum(o.total for o in outputs) / sum(o.weight for o in outputs)
    loss.backward()

    expected, count = torch.zeros(()), 0
    for row in originals(tmp_path):
        tokens = torch.tensor(greedy(theirs, row[:5]))
        student, goal = (m.logits(m(tokens))[4:-1] for m in (theirs, teacher))
        expected = expected + trl.GKDTrainer.generalized_jsd_loss(
            student, goal.detach(), beta=0.4, reduction="sum"
        )
        count += len(tokens) - 5
    (expected / count).backward()
    torch.testing.assert_close(loss, expected / count, rtol=1e-4, atol=1e-6)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_teacher_writes_what_it_finds_likeliest(tmp_path: Path) -> None:
    teacher = TinyTeacher().open(workspace(tmp_path)).model
    stream = rewritten(ByTeacher(model=TinyTeacher())).open(env(tmp_path))
    found = [s for batch in next(stream).batches for s in sequences(batch)]
    assert [list(s.tokens) for s in found] == [greedy(teacher, r[:5]) for r in originals(tmp_path)]
    assert all(s.learn.index(True) == 5 and all(s.learn[5:]) for s in found)


def test_unsure_continuations_are_left_out(tmp_path: Path) -> None:
    """With no tolerance the text stays as it is; with all of it nothing does."""
    for least, kept in ((0.0, 0.0), (-1e9, 1.0)):
        work = next(rewritten(least_logprob=least).open(env(tmp_path)))
        assert work.metrics["written_kept"] == kept
        found = [list(s.tokens) for batch in work.batches for s in sequences(batch)]
        assert (found == originals(tmp_path)) == (kept == 0.0)


def test_share_of_the_text_stays(tmp_path: Path) -> None:
    stream = rewritten(share=0.5).open(env(tmp_path))
    plain, kept, total = TEXT.open(env(tmp_path)), 0, 0
    for _ in range(10):
        found = [s.tokens for batch in next(stream).batches for s in sequences(batch)]
        before = [s.tokens for batch in next(plain).batches for s in sequences(batch)]
        kept += sum(a == b for a, b in zip(found, before, strict=True))
        total += len(found)
    assert 0.25 < kept / total < 0.75


def test_resumed_writes_the_same(tmp_path: Path) -> None:
    sampled = rewritten(sampling=Sampling(max_tokens=5), share=0.7)
    stream = sampled.open(env(tmp_path))
    next(stream)
    state = stream.state()
    assert state["step"] == 1
    expected = next(stream)
    again = sampled.open(env(tmp_path))
    again.restore(state)
    for a, b in zip(expected.batches, next(again).batches, strict=True):
        assert torch.equal(a.tokens, b.tokens)


def test_weights_and_tasks_of_the_source_stay(tmp_path: Path) -> None:
    """Each half of a batch weighs its own; so do its tokens when they are written anew."""

    class Weighed(Stream):
        """Two texts of task 3: the first counts a quarter, the second its tokens unlike."""

        def __next__(self) -> Work:
            batch = assemble(
                [Piece([5, 6, 7], [False, True, True]), Piece([8, 9, 7], [False, True, True])]
            )
            weights = torch.tensor([0.25, 0.25, 1.0, 3.0])
            return Work((dataclasses.replace(batch, weights=weights, task=3),), {})

        def state(self):
            return {}

        def restore(self, state) -> None: ...

    class Heavy(Source):
        """Of unequal texts."""

        def open(self, env: Env) -> Stream:
            return Weighed()

    given = env(tmp_path)
    config = Rewritten(source=Heavy(), prompt=1, sampling=GREEDY, share=1.0)
    (batch,) = next(config.open(given)).batches
    assert batch.task == 3
    firsts = batch.sequences == 0
    assert set(batch.weights[firsts].tolist()) == {0.25}
    assert set(batch.weights[~firsts].tolist()) == {2.0}
    assert len(batch.weights) > 4
    (kept,) = next(config.replace(least_logprob=0.0).open(given)).batches
    assert kept.weights.tolist() == [0.25, 0.25, 1.0, 3.0]


def test_of_a_short_text_all_but_the_last_token_is_kept() -> None:
    read = Written((1, 2, 3, 4), (False, True, True, True), (1.0,) * 3)
    assert [read.prompt(n) for n in (1, 2, 3, 4, 99)] == [
        *((1,), (1, 2), (1, 2, 3)),
        *((1, 2, 3), (1, 2, 3)),
    ]
    answered = Written((1, 2, 3, 4), (False, False, False, True), (1.0,))
    assert [answered.prompt(n) for n in (1, 99)] == [(1, 2, 3)] * 2


def test_sequences_of_a_tree() -> None:
    """A prompt with two answers, and a document whose middle is learned."""
    batch = assemble(
        [
            Piece([1, 2, 3], [False] * 3),
            Piece([4, 5], [True, True], parent=0),
            Piece([6], [True], parent=0),
            Piece([7, 8, 9, 10], [False, True, True, False]),
        ]
    )
    found = [(s.tokens, s.learn) for s in sequences(batch)]
    assert found == [
        ((1, 2, 3, 4, 5), (False, False, False, True, True)),
        ((1, 2, 3, 6), (False, False, False, True)),
        ((7, 8, 9), (False, True, True)),
    ]


def test_writer_of_another_vocabulary(tmp_path: Path) -> None:
    source = rewritten(ByTeacher(model=TinyTeacher(vocab=300)))
    with pytest.raises(TreadleError, match="a vocabulary of its own"):
        source.open(env(tmp_path))
