"""Mixtures of rewards against a loop over separate rows; a hack of one aspect that they resist."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pair_rows import PAIRS, pair_batch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.aspects import Aspect, AspectOf, AspectPreferences, MixtureOf
from treadle.alignment.preferences import PairFiles, pair_tree
from treadle.alignment.trees import assemble_trees, extended
from treadle.core.errors import TreadleError
from treadle.data.source import Env, Source
from treadle.data.split import LeakFreeSplit
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import Objective
from treadle.objectives.reward_mixture import (
    WHOLE,
    AspectBatch,
    MixtureBradleyTerry,
    MixtureHead,
    mixture_scores,
)
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
KINDS = [1, WHOLE, 0]
PARTS = LeakFreeSplit(validation=0, test=0)


def mixture_model() -> DecoderModel:
    model = MixtureHead(aspects=2)(tiny_model())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.scores.weight)
    torch.nn.init.normal_(model.head.gate.weight)
    return model


def aspect_batch(kinds: list[int] = KINDS) -> AspectBatch:
    return extended(AspectBatch, assemble_trees_of_pairs(), aspects=torch.tensor(kinds))


def assemble_trees_of_pairs():
    return replace(pair_batch(), reference=None)


@pytest.mark.parametrize("centre", [0.0, 0.3])
@pytest.mark.parametrize("confidence", [None, torch.tensor([1.0, 0.8, 0.6])])
def test_loss_and_gradients_by_rows(centre: float, confidence: torch.Tensor | None) -> None:
    ours, theirs = mixture_model(), mixture_model()
    batch = replace(aspect_batch(), confidence=confidence)
    output = MixtureBradleyTerry(centre=centre)(ours, batch)
    (output.total / output.weight).backward()

    def parts(prompt: list[int], answer: list[int]):
        hidden = theirs(torch.tensor(prompt + answer))
        return theirs.head.scores(hidden[-1]), theirs.head.gate(hidden[len(prompt) - 1])

    total, gates, margins = 0.0, [], []
    for i, ((prompt, good, bad), kind) in enumerate(zip(PAIRS, KINDS, strict=True)):
        (r_w, gate), (r_l, _) = parts(prompt, good), parts(prompt, bad)
        if kind == WHOLE:
            g = gate.exp() / gate.exp().sum()
            d = sum(g[k] * (r_w[k] - r_l[k]).detach() for k in range(2))
            pull = 0.0
        else:
            d = r_w[kind] - r_l[kind]
            pull = centre * (r_w[kind] + r_l[kind]) ** 2
        gates.append(gate.detach().softmax(-1))
        margins.append(d.item())
        q = 1.0 if confidence is None else float(confidence[i])
        p = 1 / (1 + (-d).exp())
        total = total - q * p.log() - (1 - q) * (1 - p).log() + pull
    (total / 3).backward()
    torch.testing.assert_close(output.total, total, rtol=1e-4, atol=1e-5)
    measures = {"accuracy": sum(m > 0 for m in margins), "margin": sum(margins)}
    measures |= {f"gate_{k}": float(g) for k, g in enumerate(sum(gates))}
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(measures, rel=1e-3)
    assert not any(m.requires_grad for m in output.metrics.values())
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=n)


def test_fresh_mixtures_have_no_opinion_and_equal_gates() -> None:
    model = MixtureHead(aspects=3)(tiny_model().requires_grad_(False))
    mixed = mixture_scores(model, aspect_batch())
    assert mixed.aspects.abs().max() == 0
    torch.testing.assert_close(mixed.gates, torch.full((6, 3), 1 / 3))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["head.scores.weight", "head.gate.weight"]


def write(path: Path, rows: list[tuple[str, str, str]]) -> PairFiles:
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
    return PairFiles(path=str(path), parts=PARTS)


def pairs(folder: Path) -> tuple[PairFiles, PairFiles]:
    """Questions after `p` want an x; those after `q` want many !."""
    polite = [(f"p{i}", f"{i % 7}x", f"{i % 7}y") for i in range(30)]
    loud = [(f"q{i}", f"{i % 7}!!!!!", f"{i % 7}.") for i in range(30)]
    return write(folder / "polite.jsonl", polite), write(folder / "loud.jsonl", loud)


def train(head, source: Source, objective: Objective, folder: Path) -> tuple[DecoderModel, Env]:
    torch.manual_seed(0)
    model, plan = head(tiny_model()), SingleProcess()
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=model, tokenizer=tokenizer, scratch=folder / "scratch")
    fit(
        model,
        source.open(env),
        objective,
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=60, precision=FP32(), checkpoint_every=1000),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder / "checkpoints",
    )
    return model.eval(), env


def test_a_hack_of_one_aspect_is_resisted(tmp_path: Path) -> None:
    """Shouting pays where it was asked for, and not elsewhere: the gate has learned from whole
    verdicts which prompts want what, so what is won in the aspect by shouting at the others is
    mostly lost in the mixture, where equal weights would pay half of it."""
    polite, loud = pairs(tmp_path)
    aspects = (Aspect(name="polite", pairs=polite), Aspect(name="loud", pairs=loud))
    source = AspectPreferences(aspects=aspects, per_step=24)
    model, env = train(MixtureHead(aspects=2), source, MixtureBradleyTerry(), tmp_path)

    def judged(name: str, *answers: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Differences by aspect between two answers to new prompts, and the gates."""
        files = write(tmp_path / f"{name}.jsonl", [(f"{name}{i}", *answers) for i in range(40, 60)])
        batch = assemble_trees([pair_tree(env, files, 64, i) for i in range(20)])
        mixed = mixture_scores(model, batch)
        chosen, rejected = mixed.aspects.detach().unflatten(0, (-1, 2)).unbind(1)
        return chosen - rejected, mixed.gates.detach()[::2]

    hack, gates = judged("p", "3x!!!!!", "3x")
    assert hack[:, 1].mean() > 1.0
    assert gates[:, 1].mean() < 0.3
    assert (hack * gates).sum(-1).mean() < 0
    asked, gates = judged("q", "3!!!!!", "3.")
    assert gates[:, 1].mean() > 0.7
    assert (asked * gates).sum(-1).mean() > 1.0


def test_judges_read_the_mixture_and_its_aspects() -> None:
    model, batch = mixture_model(), aspect_batch()
    mixed = mixture_scores(model, batch)
    assert torch.equal(AspectOf(number=1)(model, batch), mixed.aspects[:, 1])
    by_hand = mixed.aspects[:, 0] * mixed.gates[:, 0] + mixed.aspects[:, 1] * mixed.gates[:, 1]
    torch.testing.assert_close(MixtureOf()(model, batch), by_hand)


def test_pairs_of_all_aspects_come_and_again_as_a_whole(tmp_path: Path) -> None:
    polite, loud = pairs(tmp_path)
    aspects = (Aspect(name="polite", pairs=polite), Aspect(name="loud", pairs=loud))
    env = Env(
        model=tiny_model(), tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=tmp_path
    )
    stream = AspectPreferences(aspects=aspects, per_step=120).open(env)
    kinds = torch.cat([b.aspects for b in next(stream).batches])
    assert {k: int((kinds == k).sum()) for k in (0, 1, WHOLE)} == {0: 30, 1: 30, WHOLE: 60}
    (tmp_path / "left_out.json").unlink()
    stream = AspectPreferences(aspects=aspects, whole=(loud,), per_step=90).open(env)
    kinds = torch.cat([b.aspects for b in next(stream).batches])
    assert {k: int((kinds == k).sum()) for k in (0, 1, WHOLE)} == {0: 30, 1: 30, WHOLE: 30}


def test_wrong_aspects_are_refused(tmp_path: Path) -> None:
    polite, _ = pairs(tmp_path)
    same = write(tmp_path / "same.jsonl", [("q", "a", "a")])
    one = Aspect(name="one", pairs=polite)
    with pytest.raises(ValueError, match="two aspects are called `one`"):
        AspectPreferences(aspects=(one, one))
    env = Env(
        model=tiny_model(), tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=tmp_path
    )
    with pytest.raises(TreadleError, match="no pair of the aspect `two` can be learned from"):
        AspectPreferences(aspects=(one, Aspect(name="two", pairs=same))).open(env)
    (tmp_path / "left_out.json").unlink()
    with pytest.raises(TreadleError, match="no pair of those compared as a whole can be learned"):
        AspectPreferences(aspects=(one, one.replace(name="two")), whole=(same,)).open(env)
    with pytest.raises(TreadleError, match=r"of aspect 2, but the head has 2: set Mixture.*=3"):
        MixtureBradleyTerry()(mixture_model(), aspect_batch([0, 2, WHOLE]))
    with pytest.raises(TreadleError, match="no scores by aspect"):
        MixtureBradleyTerry()(tiny_model(), aspect_batch())
    with pytest.raises(TreadleError, match="there is no aspect 2; the model has 2"):
        AspectOf(number=2)(mixture_model(), aspect_batch())
