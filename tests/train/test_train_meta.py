"""Meta-learning: gradients of whole episodes, sine waves and made-up languages never seen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_env import ChatModel, Numbered, chat_env
from torch import Tensor, nn
from torch.func import functional_call
from train.tiny import VOCAB, documents, tiny_model

from treadle.core.config import to_yaml
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.batch import Piece, assemble
from treadle.data.supervised import Supervised
from treadle.models.source import Pretrained
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.train.meta import (
    MAML,
    Episode,
    FirstOrderMAML,
    Loss,
    MetaMethod,
    Reptile,
    Weights,
    adapt,
)
from treadle.train.meta_train import Episodes, LossOf, MetaTrain
from treadle.train.precision import BF16, FP32
from treadle.train.rng import seed_everything
from treadle.train.run import WEIGHTS, Trained

LR = 0.05


def here(folder: Path) -> Workspace:
    return Workspace(folder, folder, Pipeline.model_construct())


def network(width: int = 40) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(1, width), nn.Tanh()),
        *(nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, 1),
    )


def loss_of(model: nn.Module) -> Loss:
    def loss(weights: Weights, batch: Any) -> Tensor:
        x, y = batch
        out: Tensor = functional_call(model, dict(weights), (x,))
        return (out - y).square().mean()

    return loss


def sine(generator: torch.Generator, shots: int = 10, steps: int = 1) -> Episode:
    """y = A sin(x + phase), as in the paper."""
    size, phase = torch.rand(2, generator=generator).tolist()
    amplitude, shift = 0.1 + 4.9 * size, math.pi * phase

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(n, 1, generator=generator) - 5
        return x, amplitude * torch.sin(x + shift)

    support = draw(shots)
    return Episode([support] * steps, draw(50))


def episode_loss(loss: Loss, weights: Weights, episode: Episode, lr: float) -> Tensor:
    """What MAML minimises, with one graph through all inner steps."""
    here = dict(weights)
    for batch in episode.support:
        slopes = torch.autograd.grad(loss(here, batch), list(here.values()), create_graph=True)
        here = {n: w - lr * g for (n, w), g in zip(here.items(), slopes, strict=True)}
    return loss(here, episode.query)


def test_maml_gradient_is_that_of_the_whole_episode() -> None:
    """Against autograd through all inner steps, and against differences of the episode's loss."""
    torch.manual_seed(0)
    model = network(5).double()
    loss, weights = loss_of(model), dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    episodes = [
        Episode(
            [tuple(t.double() for t in batch) for batch in episode.support],
            tuple(t.double() for t in episode.query),
        )
        for episode in (sine(generator, steps=3), sine(generator, steps=3))
    ]
    found = MAML()(loss, weights, episodes, LR)
    total = sum(episode_loss(loss, weights, e, LR) for e in episodes) / 2
    expected = torch.autograd.grad(total, list(weights.values()))
    assert found.query_loss == pytest.approx(float(total.detach()))
    first = FirstOrderMAML()(loss, weights, episodes, LR)
    for (name, ours), theirs in zip(found.gradients.items(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (first.gradients[name] - theirs).abs().max() > 1e-3  # the second order matters
    name, h = "2.weight", 1e-6
    ends = []
    for sign in (1, -1):
        moved = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        moved[name].data[1, 2] += sign * h
        ends.append(float(sum(episode_loss(loss, moved, e, LR) for e in episodes).detach()) / 2)
    assert float(found.gradients[name][1, 2]) == pytest.approx((ends[0] - ends[1]) / (2 * h), 1e-4)


def test_maml_through_fused_kernels(tmp_path: Path) -> None:
    """On a decoder, along the gradient itself: differences of the loss after adaptation."""
    model = LoRA(rank=2, alpha=2.0)(tiny_model())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(".B"):
                p.normal_(std=0.3)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = LossOf(replace(chat_env(tmp_path), model=model))
    batches = [assemble(documents(i, 4)) for i in range(3)]
    episode, lr, h = Episode(batches[:2], batches[2]), 1.5, 5e-3
    slopes = {}
    for method in (MAML(), FirstOrderMAML()):
        found = method(loss, weights, [episode], lr).gradients
        size = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
        ends = []
        for sign in (1, -1):
            moved = {n: w.detach() + sign * h * found[n] / size for n, w in weights.items()}
            ended = adapt(loss, moved, episode.support, lr)[-1]
            ends.append(float(loss(ended, episode.query).detach()))
        slopes[type(method)] = (ends[0] - ends[1]) / (2 * h) / size
    assert slopes[MAML] == pytest.approx(1.0, rel=0.02), slopes
    assert slopes[FirstOrderMAML] != pytest.approx(1.0, rel=0.06), slopes


def test_reptile_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    weights = dict(model.named_parameters())
    episode = Episode([(x, y), (x, y)], (x, y))
    found = Reptile()(loss_of(model), weights, [episode], 0.1)
    w, b = model.weight.item(), model.bias.item()
    start = (w, b)
    for _ in range(2):
        errors = [w * 1 + b - 3, w * 2 + b - 5]
        slope_w, slope_b = errors[0] * 1 + errors[1] * 2, sum(errors)
        w, b = w - 0.1 * slope_w, b - 0.1 * slope_b
    assert float(found.gradients["weight"]) == pytest.approx((start[0] - w) / 0.2, rel=1e-4)
    assert float(found.gradients["bias"]) == pytest.approx((start[1] - b) / 0.2, rel=1e-4)
    expected = ((w + b - 3) ** 2 + (2 * w + b - 5) ** 2) / 2
    assert found.query_loss == pytest.approx(expected, rel=1e-4)


def test_maml_from_weights_that_are_all_zero() -> None:
    """An added part often begins at nothing; its curvature is none the less there."""
    torch.manual_seed(0)
    model = network(5).double()
    added = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    base = {n: p.detach() for n, p in model.named_parameters()}
    whole = loss_of(model)

    def loss(weights: Weights, batch: Any) -> Tensor:
        return whole({n: base[n] + w for n, w in weights.items()}, batch)

    drawn = sine(torch.Generator().manual_seed(1), steps=2)
    episode = Episode(
        [tuple(t.double() for t in batch) for batch in drawn.support],
        tuple(t.double() for t in drawn.query),
    )
    found = MAML()(loss, added, [episode], LR).gradients
    leaves = {n: w.requires_grad_() for n, w in added.items()}
    expected = torch.autograd.grad(episode_loss(loss, leaves, episode, LR), list(leaves.values()))
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_step_of_a_difference_goes_with_the_weights(scale: float) -> None:
    """sum(w^4) in float32, whose curvature is 12 w^2, with small weights and with large ones."""
    torch.manual_seed(0)
    u, v = torch.randn(20), torch.randn(20)

    def loss(weights: Weights, batch: Any) -> Tensor:
        return (weights["w"] / scale).pow(4).sum() * scale**2

    found = MAML().hessian_product(loss, {"w": scale * u}, None, {"w": v})
    torch.testing.assert_close(found["w"], 12 * u.square() * v, rtol=0.01, atol=0.01)


def joint(loss: Loss, weights: Weights, episodes: list[Episode]) -> dict[str, Tensor]:
    """All tasks learned as one: the baseline that does not know it will be adapted."""
    total = sum(loss(weights, episode.query) for episode in episodes)
    assert isinstance(total, Tensor)
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


@pytest.mark.parametrize("method", [MAML(), FirstOrderMAML(), Reptile()], ids=str)
def test_sines_never_seen_need_ten_points(method: MetaMethod) -> None:
    """After a few steps on ten points: far better than from a start that learned all sines."""
    inner = 1 if isinstance(method, MAML) else 5

    def trained(meta: MetaMethod | None) -> tuple[Loss, Weights]:
        torch.manual_seed(0)
        model = network()
        weights, generator = dict(model.named_parameters()), torch.Generator().manual_seed(2)
        loss, optimizer = loss_of(model), torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(400):
            episodes = [sine(generator, steps=inner) for _ in range(3)]
            if meta is None:
                found = joint(loss, weights, episodes)
            else:
                found = meta(loss, weights, episodes, 0.02).gradients
            for name, parameter in weights.items():
                parameter.grad = found[name]
            optimizer.step()
        return loss, weights

    def after(loss: Loss, weights: Weights) -> float:
        generator, total = torch.Generator().manual_seed(99), 0.0
        for _ in range(40):
            episode = sine(generator, steps=5)
            ended = adapt(loss, weights, episode.support, 0.02)[-1]
            total += float(loss(ended, episode.query).detach()) / 40
        return total

    assert after(*trained(method)) < 0.75 * after(*trained(None))


def test_a_text_task_never_seen(tmp_path: Path) -> None:
    """Each task shifts the alphabet by its own number; the held-out shift is learned faster."""
    torch.manual_seed(0)

    def piece(shift: int, first: int) -> Piece:
        tokens = [(first + i * shift) % VOCAB for i in range(8)]
        return Piece(tokens, [i > 1 for i in range(8)])

    def episode(shift: int, generator: torch.Generator) -> Episode:
        starts = torch.randint(0, VOCAB, (5, 8), generator=generator).tolist()
        batches = [assemble([piece(shift, s) for s in row]) for row in starts]
        return Episode(batches[:-1], batches[-1])

    def after(meta: bool) -> float:
        model, generator = tiny_model(seed=3, dim=32), torch.Generator().manual_seed(0)
        loss = LossOf(replace(chat_env(tmp_path), model=model))
        weights = dict(model.named_parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(150 if meta else 0):
            episodes = [episode(2 + (3 * step + j) % 9, generator) for j in range(2)]
            found = Reptile()(loss, weights, episodes, 0.5)
            for name, parameter in weights.items():
                parameter.grad = found.gradients[name]
            optimizer.step()
        unseen = episode(12, generator)
        before = float(loss(weights, unseen.query).detach())
        ended = float(loss(adapt(loss, weights, unseen.support, 0.5)[-1], unseen.query))
        return before - ended

    assert after(meta=True) > 2 * after(meta=False)


def test_mistakes_are_named(tmp_path: Path) -> None:
    few = Supervised(conversations=Numbered(word="loom", amount=5))
    step = MetaTrain(
        model=Pretrained(name="any"),
        tasks=(few, few),
        optimizer=AdamW(lr=1e-3),
        shots=2,
        inner_steps=2,
        steps=1,
    )
    env = chat_env(tmp_path)
    with pytest.raises(ConfigError, match=r"an episode takes 6 conversations .* has only 5"):
        step.train(env, here(tmp_path))
    cut = Supervised(conversations=Numbered(word="loom"), longest=2)
    with pytest.raises(TreadleError, match="none of 2 conversations has an assistant token within"):
        step.replace(tasks=(cut, cut)).train(env, here(tmp_path))
    env.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing trains; add a transform such as LoRA"):
        step.train(env, here(tmp_path))
    wild = chat_env(tmp_path)
    torch.nn.init.constant_(wild.model.norm.weight, math.inf)
    with pytest.raises(TreadleError, match="the loss of step 1 is nan; lower inner_lr"):
        step.replace(inner_steps=1).train(wild, here(tmp_path))


def test_inner_steps_that_diverge_are_named(tmp_path: Path) -> None:
    task = Supervised(conversations=Numbered(word="warp", amount=12))
    step = MetaTrain(
        model=Pretrained(name="any"),
        tasks=(task, task),
        optimizer=AdamW(lr=1e-3),
        shots=2,
        inner_steps=1,
        inner_lr=1e3,
        steps=1,
    )
    env = chat_env(tmp_path)  # all weights are open, the table of embeddings too
    with pytest.raises(TreadleError, match=r"a blind guess has \d.*they diverge; lower inner_lr"):
        step.train(env, here(tmp_path))


def test_what_a_step_found_is_opened_again(tmp_path: Path) -> None:
    """The same weights as where the step's parts are put together by hand."""
    model = ChatModel(folder=str(tmp_path / "model"))
    step = MetaTrain(
        model=model,
        transforms=(LoRA(rank=2),),
        tasks=tuple(Supervised(conversations=Numbered(word=w)) for w in ("warp", "weft")),
        optimizer=AdamW(lr=1e-2),
        shots=2,
        inner_steps=1,
        inner_lr=0.5,
        steps=2,
        precision=FP32(),
    )
    root = tmp_path / "run"
    execute(Pipeline(name="p", steps=(step,)), root)
    work = Workspace(root, root / "later", Pipeline(name="p", steps=()))
    found = Trained(step="meta").open(work)
    env = replace(chat_env(tmp_path), model=LoRA(rank=2)(model.open(work).model))
    (hand := tmp_path / "hand").mkdir()
    step.train(env, here(hand))
    losses = [json.loads(line)["loss"] for line in (hand / "metrics.jsonl").open()]
    names = [name for name, p in env.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2
    for name in names:
        torch.testing.assert_close(found.model.get_parameter(name), env.model.get_parameter(name))
    assert found.bytes_on_disk == (root / "meta" / WEIGHTS).stat().st_size
    lines = (root / "meta" / "metrics.jsonl").read_text().splitlines()
    found_losses = [(line["step"], line["loss"]) for line in map(json.loads, lines)]
    assert found_losses == [(i, pytest.approx(loss)) for i, loss in enumerate(losses, 1)]
    metrics = read_manifest(root / "meta")["metrics"]
    assert metrics["precision"] == "float32"
    assert metrics["parameters_trained"] == sum(env.model.get_parameter(n).numel() for n in names)


def test_an_episode_shows_a_conversation_once(tmp_path: Path) -> None:
    """Of 12 conversations of one task 3 in each of 3 inner steps, and 3 to be judged by."""
    env = chat_env(tmp_path)
    step = MetaTrain(
        model=Pretrained(name="any"),
        tasks=tuple(
            Supervised(conversations=Numbered(word=w, amount=12)) for w in ("warp", "weft")
        ),
        optimizer=AdamW(lr=1e-2),
        shots=3,
        inner_steps=3,
        tasks_per_step=1,
    )
    episodes, seen = Episodes(step, env), set()
    for _ in range(6):
        (episode,) = next(episodes)
        batches = [*episode.support, episode.query]
        assert [batch.sequence_count for batch in batches] == [3] * 4
        text = " ".join(env.tokenizer.decode(batch.tokens.tolist()) for batch in batches)
        found = re.findall(r"(warp|weft) (\d+)", text)
        words = {word for word, _ in found}
        assert len(words) == 1
        assert sorted(int(number) for _, number in found) == list(range(12))
        seen |= words
    assert seen == {"warp", "weft"}


def test_what_goes_on_computes_as_it_began(tmp_path: Path) -> None:
    """The precision that was found best stays, wherever the run goes on."""
    step = MetaTrain(
        model=ChatModel(folder=str(tmp_path / "model")),
        transforms=(LoRA(rank=2),),
        tasks=tuple(Supervised(conversations=Numbered(word=w)) for w in ("warp", "weft")),
        optimizer=AdamW(lr=1e-2),
        shots=1,
        inner_steps=1,
        steps=1,
    )
    for precision in (BF16(), FP32()):
        (folder := tmp_path / str(precision.dtype())).mkdir()
        (folder / "precision.yaml").write_text(to_yaml(precision))
        metrics = step.execute(Workspace(folder, folder, Pipeline(name="p", steps=())))
        assert f"torch.{metrics['precision']}" == str(precision.dtype())


def test_the_step_trains_what_the_transforms_opened(tmp_path: Path) -> None:
    tasks = tuple(
        Supervised(conversations=Numbered(word=w, amount=12)) for w in ("warp", "weft", "reed")
    )
    step = MetaTrain(
        model=Pretrained(name="any"),
        tasks=tasks,
        optimizer=AdamW(lr=1e-2),
        shots=3,
        inner_steps=2,
        inner_lr=0.5,
        steps=12,
    )
    env = chat_env(tmp_path)
    LoRA(rank=2)(env.model)
    before = {n: p.detach().clone() for n, p in env.model.named_parameters()}
    step.train(env, here(tmp_path))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert len(losses) == step.steps
    assert losses[-1] < losses[0]
    for name, parameter in env.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Adapters, the optimiser's memory, the tasks that are drawn and what dropout drops."""
    tasks = tuple(Supervised(conversations=Numbered(word=w, amount=12)) for w in ("warp", "reed"))
    step = MetaTrain(
        model=Pretrained(name="any"),
        tasks=tasks,
        optimizer=AdamW(lr=1e-2),
        shots=3,
        inner_steps=2,
        inner_lr=0.5,
        steps=9,
        checkpoint_every=4,
    )

    class Killed(FirstOrderMAML):
        """Ends after six steps of two tasks."""

        def direction(
            self, loss: Loss, path: Sequence[Weights], episode: Episode, lr: float
        ) -> dict[str, Tensor]:
            calls.append(1)
            if len(calls) > 12:
                raise KeyboardInterrupt
            return super().direction(loss, path, episode, lr)

    def trained(folder: Path, method: MetaMethod) -> dict[str, Tensor]:
        env = chat_env(folder)
        model = LoRA(rank=2, dropout=0.2)(env.model).train()
        step.replace(method=method).train(env, here(folder))
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    calls: list[int] = []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = trained(whole, FirstOrderMAML())
    with pytest.raises(KeyboardInterrupt):
        trained(killed, Killed())
    assert [p.name for p in (killed / "checkpoints").iterdir()] == ["step-000004"]
    seed_everything(99)
    found = trained(killed, FirstOrderMAML())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    lines = [
        [(row["step"], row["loss"]) for row in map(json.loads, (f / "metrics.jsonl").open())]
        for f in (whole, killed)
    ]
    assert lines[0] == lines[1]
    assert [number for number, _ in lines[0]] == list(range(1, 10))
