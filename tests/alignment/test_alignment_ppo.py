"""PPO's rollouts: penalties and returns, epochs over one lot, the penalty's steering, learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from alignment.learn import learn
from alignment.ppo_workers import PPOLetters, env, lots, moved, source
from tiny_generation import tiny_model
from train.processes import launch

from treadle.alignment.value_head import ValueHead
from treadle.objectives.ppo import PPO
from treadle.peft.lora import LoRA


def test_returns_of_a_fresh_value_head_are_the_rewards_to_come(tmp_path: Path) -> None:
    """With V = 0, gamma = lambda = 1 and no penalty, every token's return is the score."""
    model = ValueHead()(tiny_model())
    config = source(lam=1.0, beta=0.0)
    stream = config.open(env(model, tmp_path))
    next(stream)
    again = config.rollouts.open(env(model, tmp_path))
    scores = [r for g in again.roll() for r in g.rewards]
    for episode, score in zip(stream.lot, scores, strict=True):
        assert episode.returns == pytest.approx([score] * len(episode.tokens))
        assert episode.values == [0.0] * len(episode.tokens)


def test_the_penalty_is_paid_at_each_token(tmp_path: Path) -> None:
    """Without a score, returns are the penalties to come: -beta sum (log pi - log ref)."""
    model = ValueHead()(tiny_model())
    rollouts = source().rollouts.replace(problems=PPOLetters(weight=0.0))
    stream = source(rollouts=rollouts, lam=1.0, beta=0.5, gain=0.0).open(env(model, tmp_path))
    moved(model)
    next(stream)
    reference = tiny_model()
    for episode in stream.lot:
        row = torch.tensor(episode.prompt + episode.tokens)
        logp = reference.logits(reference(row)).log_softmax(-1)[len(episode.prompt) - 1 : -1]
        ref = logp.gather(-1, torch.tensor(episode.tokens)[:, None])[:, 0]
        penalties = -0.5 * (torch.tensor(episode.behaviour) - ref)
        to_come = penalties.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(torch.tensor(episode.returns), to_come, rtol=1e-3, atol=1e-3)


def test_a_lot_is_learned_for_its_epochs(tmp_path: Path) -> None:
    """Every epoch sees each completion once, in an order of its own."""
    model = ValueHead()(tiny_model())
    stream = source(epochs=2, minibatches=2).open(env(model, tmp_path))
    epochs: list[list[list[float]]] = [[], []]
    for step in range(4):
        epochs[step // 2].append([])
        for batch in next(stream).batches:
            epochs[step // 2][-1] += batch.behaviour.tolist()
    assert stream.lots == 1
    whole = sorted(b for e in stream.lot for b in e.behaviour)
    for halves in epochs:
        assert sorted(halves[0] + halves[1]) == pytest.approx(whole)
    assert sorted(epochs[0][0]) != sorted(epochs[1][0])
    next(stream)
    assert stream.lots == 2


def test_advantages_of_a_lot_are_whitened(tmp_path: Path) -> None:
    """From A = R - V to mean 0 and deviation 1 over its tokens; the measures are those of it."""
    model = ValueHead()(tiny_model())
    torch.nn.init.normal_(model.value.weight, std=0.3)
    stream = source(beta=0.1, target=1e-3, gain=0.5).open(env(model, tmp_path))
    moved(model)
    metrics = next(stream).metrics
    raw = torch.cat([torch.tensor(e.returns) - torch.tensor(e.values) for e in stream.lot])
    found = torch.cat([torch.tensor(e.advantages) for e in stream.lot])
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std(unbiased=False))
    reference, distances = tiny_model(), []
    for e in stream.lot:
        logp = reference.logits(reference(torch.tensor(e.prompt + e.tokens))).log_softmax(-1)
        ref = logp[len(e.prompt) - 1 : -1].gather(-1, torch.tensor(e.tokens)[:, None])
        distances.append(sum(e.behaviour) - ref.sum().item())
    assert metrics["kl"] == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert metrics["beta"] == stream.beta
    tokens = sum(len(e.tokens) for e in stream.lot)
    assert metrics["completion_tokens"] == tokens / len(stream.lot)
    assert {"solved", "repetition", "cut_off", "length_rewarded"} <= metrics.keys()


@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_the_penalty_steers_to_the_target(target: float, tmp_path: Path) -> None:
    """beta moves by k clip(KL / target - 1, -0.2, 0.2)."""
    model = ValueHead()(tiny_model())
    stream = source(beta=0.1, target=target, gain=0.5).open(env(model, tmp_path))
    moved(model)
    next(stream)
    assert stream.beta == pytest.approx(0.1 * (1.1 if target < 1 else 0.9))


def test_the_mismatch_of_a_lot_is_told_with_its_first_step(tmp_path: Path) -> None:
    """Nothing but rounding while the sampler is the policy; what the policy moves is drift."""
    model = ValueHead()(tiny_model())
    stream = source().open(env(model, tmp_path))
    first, second = next(stream), next(stream)
    assert first.metrics["mismatch"] < 1e-5
    assert [limit.metric for limit in first.limits] == ["mismatch"]
    assert second.limits == ()
    moved(model)
    output = PPO()(model, second.batches[0])
    assert float(output.metrics["drift"] / output.weight) > 0.01
    assert "mismatch" not in output.metrics


def test_a_lot_is_judged_without_dropout(tmp_path: Path) -> None:
    """Its old log-probabilities and values are those of the policy that was sampled."""
    model = ValueHead()(LoRA(rank=2, dropout=0.5)(tiny_model()))
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(weight)
    model.train()
    stream = source().open(env(model, tmp_path))
    assert next(stream).metrics["mismatch"] < 1e-5
    assert model.training


def test_reward_rises(tmp_path: Path) -> None:
    here = env(ValueHead()(tiny_model()), tmp_path)
    seen = learn(here, source(beta=0.001), steps=60, objective=PPO())
    assert seen.early("reward", 4) < 0.25
    assert seen.late("reward", 8) > seen.early("reward", 4) + 0.2


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    model = ValueHead()(tiny_model())
    stream = source().open(env(model, tmp_path))
    next(stream)
    state = stream.state()
    expected = [next(stream).batches[0] for _ in range(4)]  # into the next lot
    again = source().open(env(model, tmp_path))
    again.restore(state)
    for batch in expected:
        found = next(again).batches[0]
        assert torch.equal(found.tokens, batch.tokens)
        torch.testing.assert_close(found.returns, batch.returns)


@pytest.mark.distributed
def test_two_ranks_have_the_lot_of_one(tmp_path: Path) -> None:
    """The same penalty, advantages and measures, though each has half of the answers."""
    launch(lots, 2, tmp_path, tmp_path)
    lots(tmp_path)
    alone, *ranks = (
        json.loads((tmp_path / f"lots-{name}.json").read_text())
        for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    for lot, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert lot["beta"] != 0.1
        for name in ("kl", "beta"):
            assert [p[name] for p in parts] == pytest.approx([lot[name]] * 2, rel=1e-4)
        found = [row for p in parts for row in p["advantages"]]
        assert found == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in lot["advantages"]]
