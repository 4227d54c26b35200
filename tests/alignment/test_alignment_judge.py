"""A model as judge: what place gives is told apart from what an answer is worth."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model
from tokenizers.normalizers import Prepend

from treadle.alignment.feedback import Comparison
from treadle.alignment.judge import ByJudge, preference_odds, question, verdict
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.problems import Problems
from treadle.data.records import Problem, assistant, user
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class JudgeModel(ModelSource):
    """A tiny model of bytes with some likings."""

    context: int = 512

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(context=self.context), folder)


class NoProblems(Problems):
    def problem(self, index: int) -> Problem:
        raise AssertionError

    def score(self, problem: Problem, completion: str) -> float:
        raise AssertionError


def asked(judge: ByJudge, comparisons: list[Comparison], folder: Path):
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()))
    return judge(comparisons, NoProblems(), workspace)


def comparison(first: str, second: str) -> Comparison:
    return Comparison(Problem((user("Why {a}?"),), "", "exact"), first, second)


def test_the_bias_of_place_cancels() -> None:
    """Planted worths and a strong bias: one order agrees with the truth half of the time, both
    orders always."""
    draw = random.Random(0)
    single, both = 0, 0
    for _ in range(200):
        worth, bias = draw.gauss(0, 1), draw.gauss(6, 0.5)
        found = verdict(worth + bias, -worth + bias, 2.0)
        assert found.bias == pytest.approx(bias / 2)
        assert found.first_better == pytest.approx(1 / (1 + math.exp(-worth / 2)))
        single += (worth + bias > 0) == (worth > 0)
        both += (found.first_better > 0.5) == (worth > 0)
    assert both == 200
    assert single < 120


def test_turning_a_comparison_turns_the_verdict(tmp_path: Path) -> None:
    """And the bias, which belongs to the places, stays."""
    judge = ByJudge(model=JudgeModel(), tokens=600, precision=FP32())
    pairs = [("one {b}", "two two"), ("x", "yes, surely"), ("long " * 12, "short")]
    found = asked(judge, [comparison(*p) for p in pairs], tmp_path)
    turned = asked(judge, [comparison(b, a) for a, b in pairs], tmp_path)
    for one, other in zip(found, turned, strict=True):
        assert one.first_better == pytest.approx(1 - other.first_better, abs=1e-5)
        assert one.bias == pytest.approx(other.bias, abs=1e-4)
        assert abs(one.first_better - 0.5) > 1e-4
    same = asked(judge, [comparison("same", "same")], tmp_path)[0]
    assert same.first_better == pytest.approx(0.5)


def test_the_first_answer_is_shown_as_a_first(tmp_path: Path) -> None:
    """The formulas of Zheng et al. with the model's own odds of two written-out questions, which
    may fill the context to its last token."""
    pair, encode = comparison("alpha", "beta"), byte_tokenizer().encode
    model = tiny_model(context=512).eval()
    (a,), (b,) = encode("A"), encode("B")

    def asked_by_hand(one: str, other: str) -> list[int]:
        return encode(
            f"u:Be kind.\n\nQuestion:\nWhy {{a}}?\n\nAnswer A:\n{one}\n\nAnswer B:\n{other}\n\n"
            "Which answer is better? Say A or B.\na:"
        )

    def odds(one: str, other: str) -> float:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(asked_by_hand(one, other))))[-1]
        return float(logits[a] - logits[b])

    worth = (odds("alpha", "beta") - odds("beta", "alpha")) / 2
    place = (odds("alpha", "beta") + odds("beta", "alpha")) / 2
    assert abs(worth) > 1e-3
    length = len(asked_by_hand("alpha", "beta"))
    for context, fits in ((512, True), (length, True), (length - 1, False)):
        judge = ByJudge(
            model=JudgeModel(context=context),
            principle="Be kind.",
            temperature=0.5,
            precision=FP32(),
        )
        (found,) = asked(judge, [pair], tmp_path)
        assert bool(found.failure) != fits
        if fits:
            assert found.first_better == pytest.approx(1 / (1 + math.exp(-worth / 0.5)), abs=1e-4)
            assert found.bias == pytest.approx(place / 0.5, abs=1e-3)


def test_odds_are_those_of_the_model_alone() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    prompts = [tokenizer.encode(t, parse_special=False) for t in ("who", "better one?", "A or B")]
    found = preference_odds(model, tokenizer, prompts, 12)
    for prompt, odds in zip(prompts, found, strict=True):
        logp = model.logits(model(torch.tensor(prompt)))[-1].log_softmax(-1)
        a, b = (tokenizer.encode(x, parse_special=False)[0] for x in "AB")
        assert odds == pytest.approx(float((logp[a] - logp[b]).detach()), abs=1e-4)


def test_a_question_beyond_the_context_has_no_verdict(tmp_path: Path) -> None:
    judge = ByJudge(model=JudgeModel(context=512), precision=FP32())
    fits, beyond = comparison("a", "bb"), comparison("a", "b" * 500)
    alone = asked(judge, [fits], tmp_path)[0]
    long, short = asked(judge, [beyond, fits], tmp_path)
    assert (long.first_better, long.bias) == (0.5, None)
    assert "context of 512 tokens" in long.failure
    assert short.first_better == pytest.approx(alone.first_better, abs=1e-5)
    assert not short.failure


def test_a_broken_judge_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    encode = byte_tokenizer().encode
    with torch.no_grad():  # one answer that it cannot read is enough
        model.embedding.weight[encode("?")] = math.nan
    with pytest.raises(TreadleError, match="log-odds are not finite"):
        preference_odds(model, byte_tokenizer(), [encode("A or B"), encode("A or B?")], 64)


def test_letters_that_begin_alike_are_named() -> None:
    marked = byte_tokenizer()
    marked.backend.normalizer = Prepend("_")
    with pytest.raises(TreadleError, match="begins A and B alike: take another"):
        preference_odds(tiny_model(), marked, [[1, 2]], 64)


def test_a_whole_conversation_is_shown() -> None:
    turns = (user("first"), assistant("second"), user("third"))
    talk = Comparison(Problem(turns, "", "exact"), "x", "y")
    shown = question("Be {kind}.", talk, "x {a}", "y")
    assert "user: first\n\nassistant: second\n\nuser: third" in shown
    assert shown.startswith("Be {kind}.")
    assert shown.index("Answer A:\nx {a}") < shown.index("Answer B:\ny")
