"""Process rewards against a loop over separate rows, and what a step's batch says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.solutions import solution_tree, step_batch
from treadle.core.errors import TreadleError
from treadle.data.records import user
from treadle.data.source import Env
from treadle.models.decoder import DecoderModel
from treadle.models.reward_head import RewardHead
from treadle.objectives.process_reward import (
    ProcessReward,
    StepBatch,
    step_scores,
    worst_steps,
)

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
SOLUTIONS = [
    ("1+2?", ("one", "is 3"), (1.0, 0.0)),
    ("what?", ("x", "yy = 2", "done"), (1.0, 0.75, 0.25)),
    ("q", ("?",), (0.0,)),
]


def scored_model() -> DecoderModel:
    model = RewardHead()(tiny_model())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.linear.weight)
    return model


def batch_of(model: DecoderModel, folder: Path) -> StepBatch:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=model, tokenizer=tokenizer, scratch=folder)
    trees = [solution_tree(env, (user(q),), steps, 100) for q, steps, _ in SOLUTIONS]
    return step_batch(trees, [labels for _, _, labels in SOLUTIONS])


def row_scores(model: DecoderModel) -> list[torch.Tensor]:
    """Each step's score where the text that ends with it is a row of its own."""
    rows = []
    for question, steps, _ in SOLUTIONS:
        for t in range(1, len(steps) + 1):
            text = f"u:{question}\na:" + "".join(f"{s}\n" for s in steps[:t])
            ids = byte_tokenizer().encode(text, parse_special=False)
            rows.append(model.head.linear(model(torch.tensor(ids)))[-1, 0])
    return rows


def test_loss_and_gradients_by_rows(tmp_path: Path) -> None:
    ours, theirs = scored_model(), scored_model()
    output = ProcessReward()(ours, batch_of(ours, tmp_path))
    (output.total / output.weight).backward()
    terms = []
    labels = [y for *_, row in SOLUTIONS for y in row]
    for score, y in zip(row_scores(theirs), labels, strict=True):
        p = 1 / (1 + (-score.double()).exp())
        terms.append(-(y * p.log() + (1 - y) * (1 - p).log()))
    expected = sum(terms) / 6
    expected.backward()
    assert output.weight == 6
    assert float(output.total.detach()) / 6 == pytest.approx(float(expected.detach()), rel=1e-4)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=n)


def test_metrics_are_sums_over_steps(tmp_path: Path) -> None:
    model = scored_model()
    output = ProcessReward()(model, batch_of(model, tmp_path))
    scores = [float(s.detach()) for s in row_scores(model)]
    labels = [y for *_, row in SOLUTIONS for y in row]
    agreed = sum((s > 0) == (y >= 0.5) for s, y in zip(scores, labels, strict=True))
    assert 0 < agreed < 6
    assert output.metrics["accuracy"] == agreed
    assert float(output.metrics["score"]) == pytest.approx(sum(scores), rel=1e-3, abs=1e-4)


def test_a_solution_is_worth_its_worst_step(tmp_path: Path) -> None:
    model = scored_model()
    batch = batch_of(model, tmp_path)
    assert batch.solutions.tolist() == [0, 0, 1, 1, 1, 2]
    found = worst_steps(step_scores(model, batch).detach(), batch.solutions)
    scores = iter(float(s.detach()) for s in row_scores(model))
    wanted = [min(next(scores) for _ in steps) for _, steps, _ in SOLUTIONS]
    assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert worst_steps(torch.empty(0), torch.empty(0, dtype=torch.long)).tolist() == []


def test_a_fresh_head_is_undecided(tmp_path: Path) -> None:
    model = RewardHead()(tiny_model())
    output = ProcessReward()(model, batch_of(model, tmp_path))
    assert float(output.total.detach()) == pytest.approx(6 * math.log(2))


def test_models_of_words_and_bad_solutions_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    batch = batch_of(model, tmp_path)
    with pytest.raises(TreadleError, match="gives words, not scores"):
        ProcessReward()(model, batch)
    env = Env(model=model, tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=tmp_path)
    for steps, message in (((), "no step"), (("a", " "), "a step is empty")):
        with pytest.raises(TreadleError, match=message):
            solution_tree(env, (user("q"),), steps, 100)
    with pytest.raises(TreadleError, match="it has 11 tokens, more than longest=10"):
        solution_tree(env, (user("q"),), ("abcd",), 10)
    assert len(solution_tree(env, (user("q"),), ("abcd",), 11)) == 2
