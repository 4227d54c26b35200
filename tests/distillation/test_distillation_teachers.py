"""Teachers live and on disk; students cut out of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model
from tiny_teachers import OPENED, Lines, TinyTeacher, env, workspace

from treadle.core.errors import ConfigError, FileFormatError, TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.corpus import TextCorpus
from treadle.data.source import Work
from treadle.distillation.cached import Cached
from treadle.distillation.students import Reinitialised, Thinned, thinned
from treadle.distillation.taught import Lesson, Live, Taught
from treadle.models.source import ModelSource, Opened
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.observe import observe
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.adapter import adapted
from treadle.peft.lora import LoRA
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32


def source(lesson: Lesson, **teacher) -> Taught:
    text = TextCorpus(documents=Lines(), context=32, tokens_per_step=128, tokens=64)
    return Taught(source=text, teacher=TinyTeacher(**teacher), lesson=lesson)


def works(lesson: Lesson, tmp_path: Path, steps: int) -> list[Work]:
    stream = source(lesson).open(env(tmp_path))
    found = [next(stream) for _ in range(steps)]
    stream.state()
    return found


def test_live_teacher_gives_what_its_layers_do(tmp_path: Path) -> None:
    """Hidden states against a plain pass block by block, row by row."""
    teacher = TinyTeacher().open(workspace(tmp_path)).model
    (work,) = works(Live(states=(0, 2), attention=3), tmp_path, 1)
    for batch in work.batches:
        for segment in range(len(batch.layout.lengths)):
            span = batch.layout.span(segment)
            tokens = batch.tokens[span.start : span.stop]
            context = Packed.of(Layout((len(tokens),)))
            x = teacher.embed(tokens, context)
            states = []
            for block in teacher.blocks:
                x = block(x, context)
                states.append(x)
            expected = torch.stack([states[0], states[2]])
            found = batch.teacher_states[:, span.start : span.stop]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        hidden = teacher(batch.tokens, batch.context())[batch.sources]
        torch.testing.assert_close(batch.teacher_hidden, hidden)
        logits = batch.teacher_hidden @ batch.teacher_head.T + batch.teacher_bias
        cap = batch.teacher_softcap
        torch.testing.assert_close(cap * torch.tanh(logits / cap), teacher.logits(hidden))
        seen = observe(teacher, batch, attention=(3,)).attention[3]
        for found, expected in (
            (batch.teacher_q, seen.q),
            (batch.teacher_k, seen.k),
            (batch.teacher_v, seen.v),
        ):
            torch.testing.assert_close(found, expected)
        assert batch.teacher_scale == 4**-0.5
        assert batch.step == 0
    stream = source(Live()).open(env(tmp_path))
    assert [next(stream).batches[0].step for _ in range(3)] == [0, 1, 2]
    again, state = source(Live()).open(env(tmp_path)), stream.state()
    again.restore(state)
    third, other = next(stream).batches[0], next(again).batches[0]
    assert third.step == other.step == 3
    assert torch.equal(third.tokens, other.tokens)


def test_cache_holds_the_teachers_likeliest_tokens_for_all_epochs(tmp_path: Path) -> None:
    teacher = TinyTeacher().open(workspace(tmp_path)).model
    for work in works(Cached(k=6, temperature=2.0), tmp_path, 12):
        for batch in work.batches:
            hidden = teacher(batch.tokens, batch.context())[batch.sources]
            logp = (teacher.logits(hidden) / 2.0).log_softmax(-1)
            top = logp.topk(6, -1)
            torch.testing.assert_close(batch.top_logprobs, top.values, rtol=2e-3, atol=2e-3)
            there = logp.gather(-1, batch.top_tokens.long())
            torch.testing.assert_close(there, top.values, rtol=1e-3, atol=1e-3)
    OPENED.clear()
    again = works(Cached(k=6, temperature=2.0), tmp_path, 12)
    assert not OPENED, "a full cache asks no teacher"
    first = works(Cached(k=6, temperature=2.0), tmp_path, 12)
    for a, b in zip(again, first, strict=True):
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x.top_logprobs, y.top_logprobs)


def test_interrupted_cache_goes_on(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = works(Cached(k=4), whole, 6)
    works(Cached(k=4), parts, 2)
    kept = sorted(p.name for p in parts.glob("teacher/*/*"))
    found = works(Cached(k=4), parts, 6)
    assert sorted(p.name for p in parts.glob("teacher/*/*"))[: len(kept)] == kept
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x.top_tokens, y.top_tokens)


@pytest.mark.parametrize("where", [40, -3])
def test_damaged_cache_is_named(where: int, tmp_path: Path) -> None:
    works(Cached(k=4), tmp_path, 2)
    (shard,) = tmp_path.glob("teacher/*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[where] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(FileFormatError, match="cache is damaged: delete it"):
        source(Cached(k=4)).open(env(tmp_path))
    shard.write_bytes(data[:100])
    with pytest.raises(FileFormatError, match="cache is damaged: delete it"):
        source(Cached(k=4)).open(env(tmp_path))


def test_bad_lessons(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=r"a vocabulary of its own.*Thinned"):
        source(Live(), vocab=300).open(env(tmp_path))
    with pytest.raises(TreadleError, match=r"a vocabulary of its own.*Thinned"):
        source(Cached(k=4), vocab=300).open(env(tmp_path))
    with pytest.raises(ConfigError, match=r"of the teacher: layer 7 does not exist.*0 to 3"):
        source(Live(states=(7,))).open(env(tmp_path))
    with pytest.raises(TreadleError, match="k=257 is the whole vocabulary"):
        source(Cached(k=257)).open(env(tmp_path))


def test_thinned_keeps_the_chosen_blocks(tmp_path: Path) -> None:
    """Against the teacher run through those blocks alone; all of them give the teacher itself."""
    teacher = tiny_model(None, 8, None, 16, seed=2)
    tokens = torch.arange(20)
    whole = thinned(teacher, (0, 1, 2, 3))
    assert torch.equal(whole(tokens), teacher(tokens))
    student = thinned(teacher, (1, 3))
    assert [b.mixer.window for b in student.config.blocks] == [8, 16]
    packed = Packed.of(Layout((20,)))
    x = teacher.embed(tokens, packed)
    for layer in (1, 3):
        x = teacher.blocks[layer](x, packed)
    torch.testing.assert_close(student(tokens), teacher.norm(x))
    assert [b.mixer.layer for b in student.blocks] == [0, 1]
    work = workspace(tmp_path)
    opened = Thinned(model=TinyTeacher(), layers=(0, 3)).open(work)
    assert len(opened.model.blocks) == 2
    fresh = Reinitialised(model=Thinned(model=TinyTeacher(), layers=(0, 3))).open(work).model
    assert not torch.equal(fresh.embedding.weight, opened.model.embedding.weight)
    assert len(Thinned(model=TinyTeacher(), layers=(2,)).open(work).model.blocks) == 1
    for layers, message in (((0, 9), "layer 9 does not exist"), ((2, 1), "ascending order")):
        with pytest.raises(ConfigError, match=message):
            Thinned(model=TinyTeacher(), layers=layers).open(work)


def test_thinned_folds_adapters_in(tmp_path: Path) -> None:
    class Tuned(ModelSource):
        """A teacher with a LoRA that is not at its start."""

        def open(self, workspace: Workspace) -> Opened:
            opened = TinyTeacher().open(workspace)
            torch.manual_seed(7)
            model = LoRA(rank=2, targets=("q", "down"))(opened.model)
            for layer in adapted(model).values():
                for parameter in layer.trained():
                    torch.nn.init.normal_(parameter, std=0.3)
            return Opened(model, opened.origin)

    work = workspace(tmp_path)
    teacher = Tuned().open(work).model.eval()
    student = Thinned(model=Tuned(), layers=(0, 1, 2, 3)).open(work).model.eval()
    tokens = torch.arange(9)
    torch.testing.assert_close(student(tokens), teacher(tokens), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in student.parameters())
    assert not adapted(student)


@pytest.mark.parametrize("lesson", [Live(), Cached(k=16)], ids=("live", "cached"))
def test_student_comes_near_its_teacher_through_the_loop(lesson: Lesson, tmp_path: Path) -> None:
    model = thinned(TinyTeacher().open(workspace(tmp_path)).model, (0, 3)).train()
    plan, losses = SingleProcess(), []
    for steps in (1, 30):
        result = fit(
            model,
            source(lesson).open(env(tmp_path, model)),
            Distil(terms=(SoftLabels(),)),
            optimizer=AdamW(lr=1e-2),
            schedule=Constant(),
            config=Fit(steps=steps, precision=FP32()),
            plan=plan,
            world=plan.setup("cpu"),
            folder=tmp_path / "checkpoints",
        )
        losses.append(result.loss)
    assert losses[1] < 0.5 * losses[0]


def test_hard_labels_need_no_teacher(tmp_path: Path) -> None:
    (batch, *_) = next(source(Live()).open(env(tmp_path))).batches
    output = Distil(terms=(HardLabels(),))(tiny_model(), batch)
    assert float(output.metrics["hard_labels"]) == float(output.total)


def test_teacher_with_another_template_is_of_the_same_vocabulary(tmp_path: Path) -> None:
    """A base model learns from the chat model of its family."""

    class Chatty(ModelSource):
        """The same tokens; another template, another end of text."""

        def open(self, workspace: Workspace) -> Opened:
            folder = workspace.root / "chatty"
            tokenizer = byte_tokenizer().with_template("{{ messages[0].content }}")
            tokenizer.with_special(eos="!").save(folder)
            return Opened(tiny_model(), folder)

    text = TextCorpus(documents=Lines(), context=32, tokens_per_step=128, tokens=64)
    work = next(Taught(source=text, teacher=Chatty()).open(env(tmp_path)))
    assert work.batches[0].teacher_hidden is not None


def test_teacher_whose_tokens_are_numbered_otherwise(tmp_path: Path) -> None:
    """As many tokens, but two of them have changed places."""

    class Swapped(ModelSource):
        """Bytes in another order."""

        def open(self, workspace: Workspace) -> Opened:
            folder = workspace.root / "swapped"
            byte_tokenizer().save(folder)
            path = folder / "tokenizer.json"
            data = json.loads(path.read_text(encoding="utf-8"))
            vocab = data["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
            path.write_text(json.dumps(data), encoding="utf-8")
            return Opened(tiny_model(), folder)

    text = TextCorpus(documents=Lines(), context=32, tokens_per_step=128, tokens=64)
    with pytest.raises(TreadleError, match="a vocabulary of its own"):
        Taught(source=text, teacher=Swapped()).open(env(tmp_path))
