"""PPO's loss against float64 formulas on separate rows; GAE against its definition."""

from __future__ import annotations

import pytest
import torch
from pair_rows import PAIRS, answer_logprobs, moved, pair_trees
from tiny_generation import tiny_model

from treadle.alignment.gae import gae
from treadle.alignment.trees import assemble_trees, extended
from treadle.alignment.value_head import ValueHead
from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.objectives.ppo import PPO, PPOBatch, state_values


def with_value(model: DecoderModel) -> DecoderModel:
    model = ValueHead()(model)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.value.weight, std=0.5)
    torch.nn.init.constant_(model.value.bias, 0.3)
    return model


def ppo_batch() -> PPOBatch:
    batch = assemble_trees(pair_trees())
    m = len(batch.targets)
    g = torch.Generator().manual_seed(0)
    a, noise, r, v = torch.randn(4, m, generator=g)
    with torch.no_grad():
        old = torch.cat([answer_logprobs(moved(), p, x) for p, *both in PAIRS for x in both])
    return extended(
        PPOBatch,
        batch,
        advantages=a,
        behaviour=old + 0.3 * noise,
        returns=r,
        values=0.2 * v,
    )


def by_hand(model: DecoderModel, batch: PPOBatch, *, low: float, clip: float, weight: float):
    """The paper's formulas, token by token, each answer after its own prompt."""
    terms, i = [], 0
    for prompt, *answers in PAIRS:
        for answer in answers:
            logp = answer_logprobs(model, prompt, answer)
            hidden = model(torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
            for lp, h in zip(logp, hidden, strict=True):
                value = (h * model.value.weight[0]).sum() + model.value.bias[0]
                a, r, old = (float(t[i]) for t in (batch.advantages, batch.returns, batch.values))
                ratio = torch.exp(lp - batch.behaviour[i])
                policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + low))
                near = value.clamp(old - clip, old + clip)
                square = torch.maximum((value - r) ** 2, (near - r) ** 2)
                terms.append(policy + weight * 0.5 * square)
                i += 1
    return torch.stack(terms).mean()


def test_loss_and_gradients_match_float64() -> None:
    batch = ppo_batch()
    ours, theirs = with_value(moved()), with_value(moved()).double()
    output = PPO(value_clip=0.3, value_weight=0.4)(ours, batch)
    (output.total / output.weight).backward()
    assert not any(m.requires_grad for m in output.metrics.values())
    expected = by_hand(theirs, batch, low=0.2, clip=0.3, weight=0.4)
    expected.backward()
    loss = (output.total / output.weight).double()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-5, msg=n)
    assert 0 < float(output.metrics["clipped"]) < len(batch.targets)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float) -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=g, dtype=torch.float64)
    found = gae(rewards, values, gamma=gamma, lam=lam)
    after = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    delta = rewards + gamma * after - values
    expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(9 - t)) for t in range(9)]
    torch.testing.assert_close(found.advantages, torch.stack(expected))
    if lam == 1.0:  # the returns are then those of the rewards alone
        totals = [sum(gamma**k * rewards[t + k] for k in range(9 - t)) for t in range(9)]
        torch.testing.assert_close(found.returns, torch.stack(totals))


def test_values_are_reckoned_in_float32() -> None:
    model = with_value(tiny_model())
    hidden = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = state_values(model, hidden)
    exact = hidden @ model.value.weight[0] + model.value.bias[0]
    torch.testing.assert_close(value, exact)
    assert state_values(model.bfloat16(), hidden.bfloat16()).dtype == torch.float32


def test_a_missing_value_head_is_named() -> None:
    with pytest.raises(TreadleError, match="PPO needs a value head"):
        PPO()(tiny_model(), ppo_batch())
