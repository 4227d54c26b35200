"""TRPO: its step against an explicit Fisher matrix, the bound on the KL, learning, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_generation import byte_tokenizer
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from treadle.alignment.rollouts import Rollouts
from treadle.alignment.trpo import (
    Bounds,
    conjugate_gradient,
    difference,
    fisher_product,
    logprobs,
    trust_region_step,
)
from treadle.alignment.trust_region import TRPO
from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.batch import Piece, assemble
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.inference.sampling import Sampling
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.objectives.policy import PolicyBatch
from treadle.peft.lora import LoRA
from treadle.train.checkpoint import CheckpointStore
from treadle.train.state import TrainState

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
BOUNDS = Bounds(delta=0.01, damping=0.05, iterations=400, backtracks=10, shrink=0.5)


def policy(vocab: int = 7) -> DecoderModel:
    """Small enough for its whole Fisher matrix."""
    torch.manual_seed(0)
    block = Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=4))
    model = Decoder(vocab=vocab, dim=4, context=64, blocks=(block,), std=0.6).build().double()
    model.blocks[0].ffn.requires_grad_(False)
    return model


def lot(
    advantages: list[float], temperature: float = 0.9, weights: torch.Tensor | None = None
) -> PolicyBatch:
    """A prompt and one answer of four tokens for each advantage."""
    generator = torch.Generator().manual_seed(1)
    pieces = [Piece([1, 2, 3], [False] * 3)]
    for _ in advantages:
        tokens = torch.randint(0, 7, (4,), generator=generator).tolist()
        pieces.append(Piece(tokens, [True] * 4, 0))
    batch = assemble(pieces)
    if weights is not None:
        batch = replace(batch, weights=weights)
    values = torch.tensor(advantages, dtype=torch.float64)
    return PolicyBatch(
        **{n: getattr(batch, n) for n in type(batch).__dataclass_fields__},
        advantages=values[batch.sequences],
        behaviour=torch.zeros(len(batch.targets)),
        temperature=temperature,
    )


def weighted() -> list[PolicyBatch]:
    """Two lots whose tokens do not count alike."""
    weights = torch.linspace(0.2, 1.6, 20, dtype=torch.float64)
    return [
        lot([1.0, -0.5], weights=weights[:8]),
        lot([0.3, -2.0, 0.7], weights=weights[8:]),
    ]


def explicit(model: DecoderModel, batches: list[PolicyBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The Fisher matrix and the policy gradient, one log-probability after another."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    fisher, gradient, count = torch.zeros(size, size).double(), torch.zeros(size).double(), 0.0
    for batch in batches:
        logits = model.logits(model(batch.tokens, batch.context())[batch.sources])
        logp = (logits / batch.temperature).log_softmax(-1)
        for t, target in enumerate(batch.targets.tolist()):
            for token in range(logp.shape[1]):
                d = torch.autograd.grad(logp[t, token], parameters, retain_graph=True)
                row = parameters_to_vector(d)
                weight = batch.weights[t]
                fisher += weight * logp[t, token].exp().detach() * torch.outer(row, row)
                if token == target:
                    gradient += weight * batch.advantages[t] * row
            count += float(batch.weights[t])
    return fisher / count, gradient / count


def test_the_step_is_that_of_the_explicit_fisher() -> None:
    model, batches = policy(), weighted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [logprobs(model, b).detach() for b in batches]
    fisher, gradient = explicit(model, batches)
    v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(3)).double()
    product = fisher_product(model, parameters, batches, before, v)
    torch.testing.assert_close(product, fisher @ v, rtol=1e-6, atol=1e-8)
    old = parameters_to_vector(parameters).detach()
    damped = fisher + BOUNDS.damping * torch.eye(len(gradient)).double()
    x = torch.linalg.solve(damped, gradient)
    step = (2 * BOUNDS.delta / (x @ damped @ x)).sqrt() * x
    taken = trust_region_step(model, batches, BOUNDS)
    moved = parameters_to_vector(parameters).detach() - old
    assert float((moved - taken.scale * step).norm() / moved.norm()) < 1e-4
    vector_to_parameters(old + moved, parameters)
    now = [logprobs(model, b).detach() for b in batches]
    kl, gain, count = 0.0, 0.0, 0.0
    for batch, p, q in zip(batches, before, now, strict=True):
        for t, target in enumerate(batch.targets.tolist()):
            weight = float(batch.weights[t])
            ratio = math.exp(q[t, target] - p[t, target])
            kl += weight * float(sum(p[t].exp() * (p[t] - q[t])))
            gain += weight * float(batch.advantages[t]) * (ratio - 1)
            count += weight
    assert taken.kl == pytest.approx(kl / count)
    assert 0.2 * BOUNDS.delta < taken.kl <= BOUNDS.delta
    assert taken.gain == pytest.approx(gain / count)
    assert taken.gain > 0


def test_the_mismatch_is_the_mean_gap_of_sampled_tokens() -> None:
    model, batches = policy(), weighted()
    total = weight = 0.0
    for batch in batches:
        logp = logprobs(model, batch).detach()
        for t, target in enumerate(batch.targets.tolist()):
            total += float(batch.weights[t]) * abs(float(logp[t, target] - batch.behaviour[t]))
            weight += float(batch.weights[t])
    found = trust_region_step(model, batches, BOUNDS).mismatch
    assert found == pytest.approx(total / weight)


def test_differences_are_as_long_as_float64_bears() -> None:
    """The cube root of the machine's epsilon, for a direction of length 1 from the origin."""
    here, v = torch.tensor([3.0, 0.0, 4.0]).double(), torch.tensor([0.0, 2.0, 0.0]).double()
    assert difference(here, v) == pytest.approx(np.finfo(np.float64).eps ** (1 / 3) * 6 / 2)
    assert difference(here.float(), v.float()) == pytest.approx(
        np.finfo(np.float32).eps ** (1 / 3) * 3, rel=1e-6
    )
    assert math.isfinite(difference(here, 0 * v))


def test_dropout_is_no_change_of_the_policy(tmp_path: Path) -> None:
    """Adapters with dropout: steps keep to the bound, and what was measured is repeated."""
    first = step(steps=2, transforms=(LoRA(rank=2, dropout=0.9),))
    execute(Pipeline(name="p", steps=(first,)), tmp_path)
    assert all(row["scale"] > 0 and row["mismatch"] < 1e-4 for row in rows(tmp_path))


def test_logprobs_are_not_rounded_with_the_model() -> None:
    model = policy().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = logprobs(model, lot([1.0, -0.5]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5, rtol=0)


def test_conjugate_gradients_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, 12, generator=generator).double()
    a, b = half @ half.T + torch.eye(12), torch.randn(12, generator=generator).double()
    x = conjugate_gradient(lambda v: a @ v, b, 40)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-4, atol=1e-5)
    nothing = conjugate_gradient(lambda v: a @ v, torch.zeros(12).double(), 5)
    assert float(nothing.abs().max()) == 0.0


def test_the_line_search_goes_back_and_gives_up() -> None:
    """A bound far beyond where the quadratic holds needs shorter steps; none at all is put back."""
    far = Bounds(delta=3.0, damping=0.05, iterations=50, backtracks=30, shrink=0.7)
    model = policy()
    taken = trust_region_step(model, [lot([1.0, -1.0])], far)
    assert 0 < taken.scale < 1
    assert taken.kl <= 3.0
    j = round(math.log(taken.scale) / math.log(0.7))
    assert taken.scale == pytest.approx(0.7**j)
    once = Bounds(delta=3.0, damping=0.05, iterations=50, backtracks=1, shrink=0.7)
    model = policy()
    old = parameters_to_vector(model.parameters()).detach().clone()
    none = trust_region_step(model, [lot([1.0, -1.0])], once)
    assert (none.kl, none.gain, none.scale) == (0.0, 0.0, 0.0)
    assert torch.equal(parameters_to_vector(model.parameters()).detach(), old)
    flat = trust_region_step(policy(), [lot([0.0, 0.0])], BOUNDS)
    assert (flat.kl, flat.gain, flat.scale) == (0.0, 0.0, 0.0)


class TRPOLetters(Problems):
    """Reward: the share of the text that is letters."""

    level: float | None = None

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index % 3}"),), "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        if self.level is not None:
            return self.level
        return sum(c.islower() for c in completion) / max(1, len(completion))


class TRPOModel(ModelSource):
    """A tiny model of bytes."""

    frozen: bool = False

    def open(self, workspace: Workspace) -> Opened:
        torch.manual_seed(0)
        block = Block(mixer=Attention(heads=4, kv_heads=2), ffn=GatedMLP(hidden=32))
        model = Decoder(vocab=257, dim=16, context=128, blocks=(block,) * 2, std=0.5).build()
        model.requires_grad_(not self.frozen)
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(model, folder)


def step(**changes) -> TRPO:
    source = Rollouts(
        problems=TRPOLetters(), prompts=4, completions=16, sampling=Sampling(max_tokens=8)
    )
    config = TRPO(
        model=TRPOModel(), source=source, steps=16, delta=0.2, damping=0.01, checkpoint_every=1
    )
    return config.replace(**changes)


def rows(root: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (root / "trpo" / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_under_the_bound_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(Pipeline(name="p", steps=(step(),)), tmp_path / "whole")
    whole = rows(tmp_path / "whole")
    rewards = [row["reward"] for row in whole]
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])
    assert all(0 <= row["step_kl"] <= 0.2 for row in whole)
    root = tmp_path / "cut"
    save = CheckpointStore.save

    def save_and_stop(store: CheckpointStore, number: int, state: TrainState) -> None:
        save(store, number, state)
        if number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        execute(Pipeline(name="p", steps=(step(steps=5),)), root)
    monkeypatch.undo()
    execute(Pipeline(name="p", steps=(step(steps=5),)), root)
    execute(Pipeline(name="p", steps=(step(steps=5),)), root)
    assert [r["reward"] for r in rows(root)] == rewards[:5]


def test_no_signal_is_a_clear_error(tmp_path: Path) -> None:
    source = step().source.replace(problems=TRPOLetters(level=1.0))
    with pytest.raises(TreadleError, match="rewards within every group were equal"):
        execute(Pipeline(name="p", steps=(step(source=source),)), tmp_path)


def test_a_frozen_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="no parameter is trained"):
        execute(Pipeline(name="p", steps=(step(model=TRPOModel(frozen=True)),)), tmp_path)
