"""Unlearning: losses and gradients by hand, and a model that forgets what it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_env import Numbered, chat_env
from torch import Tensor

from treadle.alignment.reference import NoReference
from treadle.alignment.unlearning import Unlearning
from treadle.core.errors import TreadleError
from treadle.data.source import Env
from treadle.data.supervised import Conversations
from treadle.objectives.dpo import sequence_logprobs
from treadle.objectives.unlearn import NPO, Forget, GradientAscent, Unlearn, UnlearnBatch

FORGET, RETAIN = Numbered(word="weft", amount=4), Numbered(word="loom", amount=6)


def source(**fields: object) -> Unlearning:
    return Unlearning(forget=FORGET, retain=RETAIN, per_step=3).replace(**fields)


def one_batch(env: Env) -> UnlearnBatch:
    (batch,) = next(source().open(env)).batches
    assert isinstance(batch, UnlearnBatch)
    return batch


@pytest.mark.parametrize(("forget", "beta"), [(GradientAscent(), None), (NPO(beta=0.3), 0.3)])
def test_losses_by_hand(forget: Forget, beta: float | None, tmp_path: Path) -> None:
    """A float64 loop over tokens, value and gradients, with a reference that is elsewhere."""
    env = chat_env(tmp_path)
    batch = one_batch(env)
    assert batch.reference is not None
    batch = replace(batch, reference=batch.reference + torch.linspace(-3, 3, len(batch.reference)))
    model = env.model.double()
    output = Unlearn(forget=forget, retain=0.7)(model, batch)
    logp = model.logits(model(batch.tokens, batch.context()))[batch.sources].log_softmax(-1)
    own: list[list[Tensor]] = [[] for _ in range(batch.sequence_count)]
    for i, (target, sequence) in enumerate(zip(batch.targets, batch.sequences, strict=True)):
        own[int(sequence)].append(logp[i, target])
    expected = torch.zeros((), dtype=torch.float64)
    means = [-float(torch.stack(part).mean().detach()) for part in own]
    for name, losses in (("forget_loss", means[::2]), ("retain_loss", means[1::2])):
        assert float(output.metrics[name]) == pytest.approx(sum(losses), rel=1e-5)
        assert not output.metrics[name].requires_grad
    assert batch.reference is not None
    for place in range(0, len(own), 2):
        gone, kept = torch.stack(own[place]), torch.stack(own[place + 1])
        if beta is None:
            expected = expected + gone.mean()
        else:
            ratio = (gone.sum() - batch.reference[place].double()).exp()
            expected = expected + 2 / beta * torch.log(1 + ratio**beta)
        expected = expected - 0.7 * kept.mean()
    assert float(output.weight) == len(own) / 2 == 3
    torch.testing.assert_close(output.total.double(), expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(output.total, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_npo_is_ascent_for_small_beta(tmp_path: Path) -> None:
    """2/beta log 2 + sum log(p / p_ref) + O(beta), their proposition 1."""
    logp, reference = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -6.0])
    lengths = torch.ones(2)
    value = NPO(beta=1e-3)(logp.double(), lengths, reference.double())
    expected = 2e3 * torch.tensor(2.0).double().log() + (logp - reference).double()
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-3)


def test_pairs_cover_both_sets_and_know_their_reference(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    stream = source().open(env)
    seen: set[str] = set()
    for _ in range(2):
        (batch,) = next(stream).batches
        assert isinstance(batch, UnlearnBatch)
        torch.testing.assert_close(
            batch.reference, sequence_logprobs(env.model, batch).detach(), rtol=1e-4, atol=1e-4
        )
        for place in range(batch.sequence_count):
            text = env.tokenizer.decode(batch.targets[batch.sequences == place].tolist())
            assert text.startswith("w" if place % 2 == 0 else "l")
            seen.add(text)
    assert len({t for t in seen if t[0] == "w"}) == 4
    assert len({t for t in seen if t[0] == "l"}) == 6


def mean_logp(env: Env, conversations: Conversations) -> float:
    pair = source(forget=conversations, retain=conversations, reference=NoReference(), per_step=6)
    scratch = env.scratch / "measure"
    scratch.mkdir(exist_ok=True)
    (batch,) = next(pair.open(replace(env, scratch=scratch))).batches
    with torch.no_grad():
        return float(sequence_logprobs(env.model, batch).sum() / batch.weights.sum())


@pytest.mark.parametrize("forget", [GradientAscent(), NPO()])
def test_it_forgets_and_keeps(forget: Forget, tmp_path: Path) -> None:
    """Learn both sets, then unlearn one: it becomes unlikely, the other stays likely."""
    env = chat_env(tmp_path, dim=32)
    learn = torch.optim.Adam(env.model.parameters(), lr=1e-2)
    both = source(reference=NoReference()).open(env)
    for _ in range(100):
        (batch,) = next(both).batches
        loss = -sequence_logprobs(env.model, batch).sum() / batch.weights.sum()
        learn.zero_grad()
        loss.backward()
        learn.step()
    (tmp_path / "left_out.json").unlink()
    known = mean_logp(env, FORGET), mean_logp(env, RETAIN)
    assert min(known) > -0.6
    learned = {n: w.clone() for n, w in env.model.state_dict().items()}
    fallen = {}
    for retain in (1.0, 0.0):
        env.model.load_state_dict(learned)
        objective = Unlearn(forget=forget, retain=retain)
        unlearned(env, objective)
        fallen[retain] = known[0] - mean_logp(env, FORGET), known[1] - mean_logp(env, RETAIN)
    gone, kept = fallen[1.0]
    assert gone > 1.0
    assert kept < gone / 3
    assert kept < 0.7 * fallen[0.0][1]  # without a retain set the rest goes too


def unlearned(env: Env, objective: Unlearn) -> None:
    stream = source().open(env)
    unlearn = torch.optim.Adam(env.model.parameters(), lr=2e-3)
    for _ in range(25):
        (batch,) = next(stream).batches
        assert isinstance(batch, UnlearnBatch)
        output = objective(env.model, batch)
        unlearn.zero_grad()
        (output.total / output.weight).backward()
        unlearn.step()


def test_mistakes_are_named(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    (batch,) = next(source(reference=NoReference()).open(env)).batches
    with pytest.raises(TreadleError, match="NPO compares with the model before unlearning"):
        Unlearn()(env.model, batch)  # type: ignore[arg-type]
    with pytest.raises(TreadleError, match="`retain` must be a known number of conversations"):
        source(retain=Numbered(word="loom", endless=True)).open(env)
