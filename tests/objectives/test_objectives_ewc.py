"""Elastic weight consolidation: the spring and the Fisher information, computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chat_env import ChatModel, Numbered, chat_env
from train.tiny import documents, tiny_model

from treadle.core.errors import ConfigError
from treadle.core.files import write_text
from treadle.core.pipeline import MANIFEST, Pipeline, Workspace
from treadle.data.batch import assemble
from treadle.data.records import Chat
from treadle.data.supervised import Supervised
from treadle.objectives.causal import CausalLM
from treadle.objectives.ewc import EWC, Memory, remember
from treadle.peft.adapter import adapted, merge
from treadle.peft.lora import LoRA
from treadle.peft.sparse import with_masks
from treadle.train.fisher import (
    Fisher,
    FisherMasked,
    Remembered,
    examples,
    fisher,
    fisher_masks,
)
from treadle.train.precision import FP32


def test_penalty_by_hand() -> None:
    """Value and gradient of lambda/2 sum F (w - w*)^2, over two earlier tasks, beside the loss."""
    torch.manual_seed(0)
    model = LoRA(rank=2, targets=("q",))(tiny_model())
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    F_, anchor = (
        [{n: torch.rand_like(p) for n, p in names.items()} for _ in range(2)] for _ in "ab"
    )
    for task in range(2):
        remember(model, F_[task], anchor[task])
    batch = assemble(documents(0, 4))
    plain = CausalLM()(model, batch)
    output = EWC(objective=CausalLM(), strength=3.0)(model, batch)
    expected = 0.0
    for task in range(2):
        for name, parameter in names.items():
            for f, w, a in zip(
                F_[task][name].flatten().tolist(),
                parameter.flatten().tolist(),
                anchor[task][name].flatten().tolist(),
                strict=True,
            ):
                expected += 1.5 * f * (w - a) ** 2
    assert float((output.total - plain.total).detach()) / float(output.weight) == pytest.approx(
        expected, rel=1e-4
    )
    assert float(output.metrics["spring"] / output.weight) == pytest.approx(expected, rel=1e-4)
    assert not any(value.requires_grad for value in output.metrics.values())
    ours = torch.autograd.grad(output.total - plain.total, list(names.values()))
    for (name, parameter), gradient in zip(names.items(), ours, strict=True):
        pull = sum(3.0 * F_[t][name] * (parameter - anchor[t][name]) for t in range(2))
        torch.testing.assert_close(gradient / output.weight, pull, rtol=1e-3, atol=1e-4)


def test_fisher_by_hand(tmp_path: Path) -> None:
    """The mean square of the gradient of each conversation's log-probability."""
    env = chat_env(tmp_path)
    source = Supervised(conversations=Numbered(word="loom"), per_step=4)
    batches = list(examples(source, env, 5))
    assert len(batches) == 5
    assert all(batch.sequence_count == 1 for batch in batches)
    model = env.model
    found = fisher(model, CausalLM(), batches, env)
    names = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in names.items()}
    for batch in batches:
        logits = model.logits(model(batch.tokens))[batch.sources]
        model.zero_grad()
        F.cross_entropy(logits, batch.targets, reduction="sum").backward()
        for name, parameter in names.items():
            assert parameter.grad is not None
            expected[name] += parameter.grad**2 / 5
    assert found.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


class Silent(Numbered):
    """Now and then nobody answers."""

    def conversation(self, index: int) -> Chat:
        chat = super().conversation(index)
        return chat if index % 4 else Chat(chat.messages[:1])


def test_fisher_is_of_the_model_without_dropout(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    batches = list(examples(Supervised(conversations=Numbered(word="loom")), env, 3))
    model = LoRA(rank=4, targets=("q",), dropout=0.5)(env.model.train())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found = [fisher(model, CausalLM(), batches, env) for _ in range(2)]
    assert model.training
    model.eval()
    found.append(fisher(model, CausalLM(), batches, env))
    for name, expected in found[2].items():
        assert torch.equal(found[0][name], expected)
        assert torch.equal(found[1][name], expected)


def test_conversations_without_an_answer_are_no_examples(tmp_path: Path) -> None:
    source = Supervised(conversations=Silent(word="loom", amount=20))
    assert len(list(examples(source, chat_env(tmp_path), 20))) == 15


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    """A model that remembers it, and one that trains where it is largest."""
    source = Supervised(conversations=Numbered(word="loom", amount=3), per_step=4)
    model, folder = ChatModel(folder=str(tmp_path)), tmp_path / "fisher"
    folder.mkdir()
    work = Workspace(tmp_path, folder, Pipeline(name="none", steps=()))
    step = Fisher(model=model, source=source, examples=3, precision=FP32())
    figures = step.execute(work)
    write_text(folder / MANIFEST, "{}")
    env = chat_env(tmp_path)
    expected = fisher(env.model, CausalLM(), examples(source, env, 3), env)
    assert figures["trace"] == pytest.approx(sum(float(f.sum()) for f in expected.values()))
    assert figures["parameters"] == sum(p.numel() for p in env.model.parameters())

    memory = Remembered(model=model, step="fisher").open(work).model.get_submodule("memory_0")
    assert isinstance(memory, Memory)
    assert set(memory.names) == set(expected)
    for place, name in enumerate(memory.names):
        torch.testing.assert_close(memory.get_buffer(f"fisher_{place}"), expected[name])
        assert torch.equal(memory.get_buffer(f"anchor_{place}"), env.model.get_parameter(name))

    masked = FisherMasked(model=model, step="fisher", density=0.1, targets=("q", "up"))
    layers = adapted(masked.open(work).model)
    masks = fisher_masks(env.model, expected, ("q", "up"), 0.1)
    assert {n: m.places.tolist() for n, m in layers.items()} == {
        n: places.tolist() for n, places in masks.items() if len(places)
    }


def test_masks_are_the_largest_of_all_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    information = {n: torch.rand_like(p) * (3 if "blocks.1" in n else 1)
                   for n, p in model.named_parameters()}  # fmt: skip
    masks = fisher_masks(model, information, ("q", "down"), 0.1)
    names = ("blocks.0.mixer.q", "blocks.0.ffn.down", "blocks.1.mixer.q", "blocks.1.ffn.down")
    assert tuple(masks) == names
    every = [
        (float(v), n, i) for n in names for i, v in enumerate(information[f"{n}.weight"].flatten())
    ]
    wanted = {(n, i) for _, n, i in sorted(every, reverse=True)[: int(0.1 * len(every))]}
    assert {(n, int(i)) for n in names for i in masks[n]} == wanted
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with_masks(model, masks, "test")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert set(adapted(model)) <= set(names)
    for name, after in merge(model).named_parameters():
        moved = {i for i, same in enumerate((after == before[name]).flatten().tolist()) if not same}
        assert moved == {i for n, i in wanted if f"{n}.weight" == name}


def test_mistakes_are_named(tmp_path: Path) -> None:
    env, model = chat_env(tmp_path), tiny_model()
    batch = assemble(documents(0, 2))
    with pytest.raises(ConfigError, match="the model remembers no task; open it by Remembered"):
        EWC(objective=CausalLM())(model, batch)
    names = dict(model.named_parameters())
    remember(model, {"norm.weight": names["norm.weight"]}, {"norm.weight": names["norm.weight"]})
    with pytest.raises(ConfigError, match="trains in one of the tasks and not in the other"):
        EWC(objective=CausalLM())(model, batch)
    assert not any("memory" in name for name in model.state_dict())
    assert isinstance(model.get_submodule("memory_0"), Memory)
    with pytest.raises(ConfigError, match="the source gave no example"):
        fisher(model, CausalLM(), [], env)
    with pytest.raises(ConfigError, match="nothing of the model trains"):
        fisher(tiny_model().requires_grad_(False), CausalLM(), [batch], env)
    information = {n: torch.ones_like(p) for n, p in tiny_model().named_parameters()}
    with pytest.raises(ConfigError, match="is an empty mask; raise it"):
        fisher_masks(tiny_model(), information, ("q",), 1e-6)
    with pytest.raises(ConfigError, match=r"measured nothing for `blocks.0.mixer.q`"):
        fisher_masks(tiny_model(), {}, ("q",), 0.1)
