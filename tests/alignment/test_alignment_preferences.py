"""Pairs and judged answers as batches: what is left out, what is kept, what is learned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_rows import answer_logprobs
from safetensors.torch import load_file
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.confidence import CrossFitted
from treadle.alignment.labelled import JudgedFiles, Judgements, Unpaired
from treadle.alignment.preferences import PairFiles, Preferences
from treadle.alignment.reference import InitialModel, NoReference, Reference
from treadle.alignment.trees import Tree
from treadle.core.errors import TreadleError
from treadle.data.source import Env, Source
from treadle.data.split import LeakFreeSplit
from treadle.data.tasks import Task, TaskMix
from treadle.models.decoder import DecoderModel
from treadle.models.transform import transformed
from treadle.objectives.dpo import DPO, orpo, sequence_logprobs
from treadle.objectives.kto import KTO
from treadle.objectives.objective import Objective
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.peft.lora import LoRA
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

WORDS = ("tea", "milk", "bread", "honey")
PAIRS = [
    {"prompt": f"do you like {w}?", "chosen": f"yes, {w}", "rejected": f"no {w} at all"}
    for w in WORDS
]
SAME = {"prompt": "x", "chosen": "same", "rejected": "same"}
EMPTY = {"prompt": "x", "chosen": "fine", "rejected": " "}
LONG = {"prompt": "long " * 60, "chosen": "a", "rejected": "b"}
WHOLE = LeakFreeSplit(validation=0, test=0)


def pair_files(folder: Path, rows: list[dict[str, str]]) -> PairFiles:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return PairFiles(path=str(path), parts=WHOLE)


def source(folder: Path, rows: list[dict[str, str]] = PAIRS, **changes: Any) -> Preferences:
    return Preferences(pairs=pair_files(folder, rows), **{"per_step": 4, **changes})


def env(model: DecoderModel, folder: Path) -> Env:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return Env(model=model, tokenizer=byte_tokenizer().with_template(template), scratch=folder)


def test_reference_equals_separate_rows(tmp_path: Path) -> None:
    """The numbers that come with the batch are those of each answer after its own prompt."""
    stream = source(tmp_path).open(env(tiny_model(), tmp_path))
    assert stream.reference is not None
    for place, row in enumerate(stream.reference):
        prompt, *answers = (list(p.tokens) for p in stream.tree(stream.kept[place]))
        expected = [answer_logprobs(tiny_model(), prompt, a).sum() for a in answers]
        torch.testing.assert_close(row, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_what_comes_with_a_batch_is_of_its_own_pairs(tmp_path: Path) -> None:
    """In the order in which they are drawn, with one left out before them: log-probabilities,
    margins (NaN where raters said none) and confidence (1)."""
    told = [{**p, "margin": i / 4, "confidence": 0.6 + i / 10} for i, p in enumerate(PAIRS)]
    rows = [SAME, *told, {**PAIRS[0], "prompt": "and tea?"}]
    stream = source(tmp_path, rows, per_step=5, tokens=80).open(env(tiny_model(), tmp_path))
    assert stream.kept == [1, 2, 3, 4, 5]
    work, seen = next(stream), []
    assert len(work.batches) > 1
    for batch in work.batches:
        with torch.no_grad():
            own = sequence_logprobs(tiny_model(), batch)
        torch.testing.assert_close(batch.reference, own, rtol=1e-4, atol=1e-4)
        text = byte_tokenizer().decode(batch.tokens.tolist())
        prompts = [p for p in text.split("u:") if p]
        for prompt, margin, confidence in zip(
            prompts, batch.margins.tolist(), batch.confidence.tolist(), strict=True
        ):
            (row,) = (r for r in rows[1:] if prompt.startswith(r["prompt"] + "\n"))
            assert margin == pytest.approx(row.get("margin", math.nan), nan_ok=True)
            assert confidence == pytest.approx(row.get("confidence", 1.0))
            seen.append(row["prompt"])
    assert sorted(seen) == sorted(r["prompt"] for r in rows[1:])


def test_bad_pairs_are_left_out_counted_and_named(tmp_path: Path) -> None:
    rows = [PAIRS[0], SAME, PAIRS[1], EMPTY, LONG]
    stream = source(tmp_path, rows).open(env(tiny_model(), tmp_path))
    assert stream.kept == [0, 2]
    work = next(stream)
    assert work.metrics["pairs_left_out"] == 3.0
    assert sum(b.sequence_count for b in work.batches) == 8  # the two pairs, twice
    named = json.loads((tmp_path / "left_out.json").read_text())
    assert "are the same" in named["1"]
    assert "empty" in named["3"]
    assert "no room" in named["4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SAME, "none of 1 pairs can be learned from: pair 0: chosen and rejected are the same"),
        (EMPTY, "an answer is empty"),
        (LONG, r"its prompt has 305 tokens, which leaves no room for an answer in longest=128"),
    ],
)
def test_nothing_left_is_an_error(row, message: str, tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=message):
        source(tmp_path, [row]).open(env(tiny_model(), tmp_path))


def test_each_process_has_a_pair(tmp_path: Path) -> None:
    here = replace(env(tiny_model(), tmp_path), rank=2, world=3)
    with pytest.raises(TreadleError, match="per_step=2 leaves some of 3 processes without pairs"):
        source(tmp_path, per_step=2).open(here)
    stream = source(tmp_path, per_step=3, reference=NoReference()).open(here)
    assert [b.sequence_count for b in next(stream).batches] == [2]


def test_without_reference_nothing_is_computed(tmp_path: Path) -> None:
    stream = source(tmp_path, reference=NoReference()).open(env(tiny_model(), tmp_path))
    assert next(stream).batches[0].reference is None
    assert not (tmp_path / "reference.safetensors").exists()


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    first = source(tmp_path, per_step=3).open(env(tiny_model(), tmp_path))
    next(first)
    second = source(tmp_path, per_step=3).open(env(tiny_model(), tmp_path))
    second.restore(first.state())
    for a, b in zip(next(first).batches, next(second).batches, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.reference, b.reference)


class Margins(Hook):
    def __init__(self) -> None:
        self.seen: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report)


def train(source: Source, objective: Objective, folder: Path) -> list[StepReport]:
    model, hook, plan = tiny_model(), Margins(), SingleProcess()
    fit(
        model,
        source.open(env(model, folder)),
        objective,
        optimizer=AdamW(lr=3e-3),
        schedule=Constant(),
        config=Fit(steps=12, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder / "checkpoints",
        hooks=[hook],
    )
    return hook.seen


def test_preferences_are_learned_and_the_reference_is_kept(tmp_path: Path) -> None:
    reports = train(source(tmp_path), DPO(), tmp_path)
    assert reports[0].metrics["accuracy"] == 0.0  # margins start at zero
    assert reports[-1].metrics["accuracy"] == 1.0
    kept = (tmp_path / "reference.safetensors").read_bytes()
    source(tmp_path).open(env(tiny_model(seed=5), tmp_path))
    assert (tmp_path / "reference.safetensors").read_bytes() == kept


def test_the_reference_is_asked_only_about_what_the_run_comes_to(tmp_path: Path) -> None:
    """And a run that goes on for longer asks the same model about the rest."""
    asked: list[int] = []

    class AskedAbout(Reference):
        def __call__(
            self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
        ) -> torch.Tensor | None:
            asked.extend(numbers)
            return InitialModel()(env, numbers, tree, tokens)

    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for row in PAIRS for i in range(3)]
    few = source(tmp_path, rows, per_step=2, reference=AskedAbout())
    whole = env(tiny_model(), tmp_path)
    (tmp_path / "run").mkdir()
    full = few.open(whole)
    assert sorted(asked) == list(range(12))
    for steps in (1, 3, 99):
        asked.clear()
        here = few.open(replace(whole, scratch=tmp_path / "run", steps=steps))
        assert len(asked) == min(2 * steps, 12)
        for _ in range(min(steps, 6)):
            batches = next(here).batches
            assert all(torch.isfinite(b.reference).all() for b in batches)
    torch.testing.assert_close(here.reference, full.reference)


def test_a_reference_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """What was computed before is not computed again; no more trees are held than needed."""
    rows = [{**PAIRS[i % 4], "prompt": f"{i}?"} for i in range(600)]
    stream = source(tmp_path, rows, reference=NoReference()).open(env(tiny_model(), tmp_path))
    asked: list[int] = []

    def tree(index: int) -> Tree:
        asked.append(index)
        if len(asked) == 400:
            raise KeyboardInterrupt
        return stream.tree(index)

    with pytest.raises(KeyboardInterrupt):
        InitialModel()(stream.env, stream.kept, tree, 4096)
    found = InitialModel()(stream.env, stream.kept, tree, 4096)
    assert found is not None
    assert asked[400:] == stream.kept[256:]
    prompt, *answers = (list(p.tokens) for p in stream.tree(stream.kept[300]))
    expected = [answer_logprobs(tiny_model(), prompt, a).sum() for a in answers]
    torch.testing.assert_close(found[300], torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_a_mixture_has_references_for_all_its_draws(tmp_path: Path) -> None:
    """It may draw one task several times a step, more often than the run has steps."""
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for row in PAIRS for i in range(3)]
    pairs = source(tmp_path, rows, per_step=1)
    mix = TaskMix(tasks=(Task(name="pairs", source=pairs, examples=12),), draws=3)
    stream = mix.open(replace(env(tiny_model(), tmp_path), steps=2))
    batches = [batch for _ in range(2) for batch in next(stream).batches]
    assert len(batches) == 6
    assert all(torch.isfinite(batch.reference).all() for batch in batches)
    asked = load_file(tmp_path / "pairs" / "reference.safetensors")["numbers"]
    assert len(asked) == 6


def test_odds_are_learned_without_reference(tmp_path: Path) -> None:
    reports = train(source(tmp_path, reference=NoReference()), orpo(1.0), tmp_path)
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].metrics["margin"] > reports[0].metrics["margin"]


def test_judged_answers_are_learned(tmp_path: Path) -> None:
    answers = Unpaired(pairs=pair_files(tmp_path, PAIRS))
    reports = train(Judgements(answers=answers, per_step=8), KTO(), tmp_path)
    assert reports[0].metrics["reward_good"] == pytest.approx(0.0, abs=1e-4)
    assert reports[-1].metrics["reward_good"] > reports[-1].metrics["reward_bad"]


def test_judged_answers_meet_an_answer_to_another_prompt(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i != 1} for i in range(3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    judged = JudgedFiles(path=str(path), parts=WHOLE)
    stream = Judgements(answers=judged).open(env(tiny_model(), tmp_path))
    texts = [byte_tokenizer().decode(list(p.tokens)).strip() for p in stream.tree(1)]
    assert texts == ["u:p1\na:", "c1", "c2"]
    batch = next(stream).batches[0]
    with torch.no_grad():
        own = sequence_logprobs(tiny_model(), batch)
    torch.testing.assert_close(batch.reference, own, rtol=1e-4, atol=1e-4)
    said = byte_tokenizer().decode(batch.tokens.tolist()).split("u:p")[1:]
    assert [not text.startswith("1") for text in said] == batch.good.tolist()
    labels = [stream.config.answers.answer(i).good for i in range(3)]
    assert labels == [True, False, True]
    assert len(batch.good) * 2 == batch.sequence_count


def test_doubtful_labels_are_found_in_a_stream(tmp_path: Path) -> None:
    """Flipped pairs are trusted least, though a pair among them is left out: each confidence stays
    with its own pair."""
    words = [f"{a}{b}" for a in "bdfgk" for b in ("ar", "en", "il", "or")]
    rows = [{"prompt": f"{w}?", "chosen": f"yes {w}!", "rejected": f"{w} no."} for w in words]
    flipped = {3, 8, 14}
    for i in flipped:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    rows.insert(5, SAME)
    doubt = CrossFitted(flipped=0.15)
    stream = source(tmp_path, rows, confidence=doubt, per_step=20).open(env(tiny_model(), tmp_path))
    batch = next(stream).batches[0]
    texts = byte_tokenizer().decode(batch.tokens.tolist()).split("u:")[1:]
    assert len(texts) == len(batch.confidence) == 20
    found = dict(zip((t.split("?")[0] for t in texts), batch.confidence.tolist(), strict=True))
    doubted = sorted(found, key=lambda w: found[w])[:3]
    assert set(doubted) == {words[i] for i in flipped}
    assert 0 < found[doubted[2]] < 0.5 < sorted(found.values())[3] < 1


def test_an_empty_answer_costs_no_other(tmp_path: Path) -> None:
    """It is left out itself, and what it stands beside meets the answer after it."""
    path = tmp_path / "judged.jsonl"
    rows = [
        {"prompt": f"p{i}", "completion": said, "label": i != 1}
        for i, said in enumerate(("c0", " ", "c2"))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    judged = JudgedFiles(path=str(path), parts=WHOLE)
    stream = Judgements(answers=judged).open(env(tiny_model(), tmp_path))
    assert json.loads((tmp_path / "left_out.json").read_text()) == {"1": "an answer is empty"}
    texts = [
        [byte_tokenizer().decode(list(p.tokens)).strip() for p in stream.tree(i)] for i in (0, 2)
    ]
    assert texts == [["u:p0\na:", "c0", "c2"], ["u:p2\na:", "c2", "c0"]]


def test_references_know_no_dropout(tmp_path: Path) -> None:
    """A model that is trained on from an adapter with dropout."""
    model = transformed(tiny_model(), (LoRA(rank=2, dropout=0.5),))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.fill_(0.1)
    model.train()
    stream = source(tmp_path).open(env(model, tmp_path))
    assert model.training
    batch = next(stream).batches[0]
    with torch.no_grad():
        own = sequence_logprobs(model.eval(), batch)
    torch.testing.assert_close(batch.reference, own, rtol=1e-4, atol=1e-4)


def test_one_prompt_is_not_enough_for_kto(tmp_path: Path) -> None:
    answers = Unpaired(pairs=pair_files(tmp_path, PAIRS[:1]))
    with pytest.raises(TreadleError, match="no answer is to another prompt: KTO compares"):
        Judgements(answers=answers).open(env(tiny_model(), tmp_path))
