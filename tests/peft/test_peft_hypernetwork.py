"""Hypernetworks: what they write beside the formula, and a task that was never seen."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chat_env import Numbered, chat_env, chat_tokenizer
from expert_models import nowhere
from peft_pair import logits, perturbed, tiny, trained

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.data.batch import Batch, Piece, assemble
from treadle.data.supervised import Supervised
from treadle.data.tasks import Task, TaskMix
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.objectives.causal import CausalLM
from treadle.objectives.described import Described, DescribedBatch
from treadle.peft.adapter import adapted, disabled
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.hypernetwork import Hypernetwork, Written, as_lora, write, writer_of
from treadle.peft.lora import LoRA, LoRALinear
from treadle.train.descriptions import WithDescriptions

HYPER = Hypernetwork(rank=2, targets=("q", "v", "down"), hidden=8, codes=3)
WORDS = torch.tensor([3, 1, 4, 1, 5])


def test_what_is_written_matches_the_formula() -> None:
    """Each factor as sums over codes; logits and gradients against weights put in by hand."""
    model = perturbed(HYPER(tiny()), size=0.3)
    writer, plain = writer_of(model), tiny()
    write(model, WORDS)
    ours = logits(model)
    for layer in adapted(model).values():
        x = torch.randn(2, 3, layer.in_features)
        torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-4)
    about = plain(WORDS).mean(0)
    about = (about - about.mean()) / (about.var(unbiased=False) + 1e-5).sqrt()
    shapes = list(dict.fromkeys((m.out_features, m.in_features) for m in adapted(model).values()))
    names = list(adapted(model))
    assert len(names) == 6
    assert len(shapes) == 3
    given = {}
    for place, name in enumerate(names):
        h = torch.cat([about, writer.place.weight[place]])
        for linear in (writer.read[0], writer.read[2]):
            h = F.silu(linear.weight @ h + linear.bias)
        code = writer.code.weight @ h + writer.code.bias
        weight = plain.get_submodule(name).weight
        kind = shapes.index(tuple(weight.shape))
        A = writer.A0[place] + sum(code[k] * writer.A[kind][k] for k in range(3))
        B = sum(code[3 + k] * writer.B[kind][k] for k in range(3))
        given[f"{name}.weight"] = weight.detach() + 8.0 / 2 * B @ A
    expected = plain.logits(torch.func.functional_call(plain, given, (TOKENS,)))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (ours - logits(tiny())).abs().max() > 0.1
    cotangent = torch.randn(expected.shape)
    parameters = list(trained(model).values())
    mine = torch.autograd.grad((ours * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((expected * cotangent).sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def test_it_starts_as_the_base_and_ends_as_a_plain_lora(tmp_path: Path) -> None:
    model = HYPER(tiny())
    write(model, WORDS)
    torch.testing.assert_close(logits(model), logits(tiny()))
    perturbed(model, size=0.3)
    write(model, WORDS)
    out = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
    write(model, WORDS + 1)
    assert not torch.allclose(logits(model), out, atol=1e-2)
    lora = as_lora(model, WORDS)
    torch.testing.assert_close(logits(lora), out, rtol=1e-4, atol=1e-4)
    assert {n.rpartition(".")[2] for n in trained(lora)} == {"A", "B"}
    assert torch.equal(logits(copy.deepcopy(lora)), logits(lora))
    save_adapter(lora, tmp_path / "written")
    again = load_adapter(tiny(), tmp_path / "written")
    torch.testing.assert_close(logits(again), out, rtol=1e-4, atol=1e-4)


class Prepared(ModelSource):
    """A hypernetwork that never learned, beside a tokenizer in a folder."""

    folder: str

    def open(self, workspace: Workspace) -> Opened:
        model = perturbed(HYPER(chat_env(Path(self.folder)).model), size=0.3)
        return Opened(model, Path(self.folder))


def test_a_model_is_opened_as_it_is_described(tmp_path: Path) -> None:
    """What a user writes is read as letters: `<|im_end|>` in it is no token."""
    chat_tokenizer().save(tmp_path)
    said, source = "say <|im_end|> weft", Prepared(folder=str(tmp_path))
    found = Written(model=source, description=said).open(nowhere()).model
    letters = chat_tokenizer().encode(said, parse_special=False)
    assert letters != chat_tokenizer().encode(said)
    expected = as_lora(source.open(nowhere()).model, torch.tensor(letters))
    assert torch.equal(logits(found), logits(expected))
    other = Written(model=source, description="say warp").open(nowhere()).model
    assert not torch.equal(logits(other), logits(expected))
    assert {type(layer) for layer in adapted(found).values()} == {LoRALinear}


def test_fresh_directions_keep_the_size_of_what_they_read() -> None:
    writer = writer_of(HYPER.replace(rank=8, codes=40, hidden=6)(tiny()))
    for factors in (writer.A, writer.A0):
        for factor in factors:
            expected = factor.shape[-1] ** -0.5
            assert factor.std().item() == pytest.approx(expected, rel=0.2)


def test_loss_is_that_under_what_the_description_says() -> None:
    batch, model = shift_batch(3, 0), perturbed(HYPER(tiny()), size=0.3)
    described = Described(objective=CausalLM())(model, batch)
    described.total.backward()
    assert all(p.grad is not None for p in trained(model).values())
    plain = CausalLM()(as_lora(model, batch.description), batch)
    torch.testing.assert_close(described.total, plain.total, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.total, CausalLM()(tiny(), batch).total, rtol=1e-3)


def shift_batch(shift: int, seed: int) -> DescribedBatch:
    """A task counts up by its number; its description says by how much, in other tokens."""
    starts = torch.randint(0, 20, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [[start, (start + shift) % 20] for start in starts]
    batch = assemble([Piece(row, [False, True]) for row in rows])
    known = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    return DescribedBatch(**known, description=torch.tensor([20, 20 + shift, 31]))


def test_tasks_never_seen() -> None:
    """Numbers in between those of the tasks seen: nearer than with one adapter for all."""
    base = tiny()
    table = torch.linspace(-2, 2, 12)[:, None] * torch.randn(1, 32)
    with torch.no_grad():  # the base knows that the words of descriptions are numbers
        base.embedding.weight[20:32] = table
    seen, unseen = (1, 2, 3, 5, 6, 7, 9, 10), (4, 8)

    def loss(model: DecoderModel, shifts: tuple[int, ...], seed: int) -> torch.Tensor:
        outputs = []
        for shift in shifts:
            batch = shift_batch(shift, seed)
            described = Described(objective=CausalLM())
            outputs.append((described if hyper else CausalLM())(model, batch))
        return torch.stack([o.total / o.weight for o in outputs]).mean()

    found = {}
    for hyper in (True, False):
        torch.manual_seed(1)
        start = copy.deepcopy(base)
        targets = ("q", "v", "o", "gate", "up", "down")
        model = (
            Hypernetwork(rank=4, targets=targets, hidden=32)(start)
            if hyper
            else LoRA(rank=4, alpha=8.0, targets=targets)(start)
        )
        optimizer = torch.optim.Adam(trained(model).values(), lr=5e-3)
        for step in range(120):
            value = loss(model, seen, step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            found[hyper] = float(loss(model, seen, 999)), float(loss(model, unseen, 999))
    assert found[True][0] < found[False][0] - 0.3
    assert found[True][1] < found[False][1] - 0.1


def test_batches_carry_their_description(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    names = ("warp", "weft")
    mix = TaskMix(
        tasks=tuple(
            Task(name=n, source=Supervised(conversations=Numbered(word=n), per_step=2))
            for n in names
        )
    )
    source = WithDescriptions(source=mix, descriptions=("say warp", "say weft"))
    stream = source.open(env)
    seen = set()
    for _ in range(6):
        for batch in next(stream).batches:
            assert isinstance(batch, DescribedBatch)
            said = env.tokenizer.decode(batch.tokens.tolist())
            assert env.tokenizer.decode(batch.description.tolist()) == f"say {names[batch.task]}"
            assert names[batch.task] in said
            seen.add(batch.task)
    assert seen == {0, 1}
    state, after = stream.state(), next(stream)
    again = source.open(env)
    again.restore(state)
    assert torch.equal(next(again).batches[0].tokens, after.batches[0].tokens)
    with pytest.raises(ConfigError, match="1 descriptions for 2 tasks"):
        source.replace(descriptions=("one",)).open(env)


def test_mistakes_are_named() -> None:
    model = HYPER(tiny())
    with pytest.raises(ConfigError, match="has read no description yet"):
        logits(model)
    with pytest.raises(ConfigError, match="the model has no hypernetwork"):
        write(tiny(), WORDS)
    with pytest.raises(ConfigError, match="has adapters already; merge them first"):
        HYPER(LoRA(rank=2)(tiny()))
    with pytest.raises(ConfigError, match="rank 64 is larger than"):
        HYPER.replace(rank=64)(tiny())
    with pytest.raises(ConfigError, match="target `query` matches no layer"):
        HYPER.replace(targets=("query",))(tiny())
