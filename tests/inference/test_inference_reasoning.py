"""Reasoning strategies: what is asked, which answer is taken, what is counted, what is hidden."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.reasoning.budget import ThinkingBudget
from treadle.inference.reasoning.critique import CritiqueAndRefine
from treadle.inference.reasoning.prompting import (
    ChainOfThought,
    FewShot,
    LeastToMost,
    OneAnswer,
    SelfAsk,
    Shot,
    listed,
)
from treadle.inference.reasoning.strategy import Ask, Thinker, Turns, private, visible
from treadle.inference.reasoning.votes import (
    BestOfN,
    ByLikelihood,
    BySureness,
    ByVerifier,
    Majority,
    SelfConsistency,
    elect,
)
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def asked(text: str) -> Turns:
    return ({"role": "user", "content": text},)


def answer_of(text: str) -> str | None:
    _, found, answer = text.rpartition("Answer:")
    return answer.strip() or None if found else None


class Scripted(Thinker):
    """Says what a function tells it to, and remembers what it was asked."""

    def __init__(self, say: Callable[[Ask, int], str], *, logprob: float = -0.5, **fields) -> None:
        super().__init__(None, answer_of, **fields)  # type: ignore[arg-type]
        self.say, self.logprob, self.heard = say, logprob, []

    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        rows = []
        for ask in asks:
            self.heard.append(ask)
            texts = [self.say(ask, k) for k in range(n)]
            row = [
                Completion(tuple(t.encode()), t, (self.logprob,) * len(t.encode()), "stop")
                for t in texts
            ]
            self.spent[ask.question] = self.spent.get(ask.question, 0) + sum(
                len(c.tokens) for c in row
            )
            rows.append(row)
        return rows


def thinker(**engine) -> Thinker:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Thinker(Engine(tiny_model(**engine), tokenizer), answer_of)


# Prompts


def test_prompts_are_rendered_as_specified() -> None:
    """The very text that reaches the model, by the template."""
    turns = ({"role": "system", "content": "S"}, *asked("Q"))
    shots = FewShot(shots=(Shot(question="1+1", answer="2"), Shot(question="2+2", answer="4")))
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    expected = {
        ChainOfThought(): "s:S\nu:Q\na:Let's think step by step.\n",
        SelfAsk(): "s:S\nu:Q\na:Are follow up questions needed here: Yes.\nFollow up:",
        shots: "s:S\nu:1+1\na:2\nu:2+2\na:4\nu:Q\na:",
    }
    for prompt, text in expected.items():
        conversation, prefix = prompt(turns)
        rendered = tokenizer.render(list(conversation), add_generation_prompt=True)
        assert rendered + prefix == text


def test_least_to_most_answers_the_parts_first() -> None:
    def say(ask: Ask, k: int) -> str:
        last = ask.turns[-1]["content"]
        if "Do not answer yet" in last:
            return "These:\n1. How many cats?\n- How many dogs?\n3) Sum?\n4. Too many"
        return {"How many cats?": "two", "How many dogs?": "three", "Sum?": "five"}.get(
            last, "Answer: 5"
        )

    mind = Scripted(say)
    talk = (*asked("Hi"), {"role": "assistant", "content": "Hello"}, *asked("How many pets?"))
    (thought,) = LeastToMost(parts=2)(mind, [talk])
    assert thought.answer == "5"
    plan = [t["content"] for t in mind.heard[0].turns]
    assert plan[:2] == ["Hi", "Hello"]
    assert plan[2].startswith("How many pets?\n\nDo not answer yet.")
    final = [t["content"] for t in mind.heard[-1].turns]
    assert final == [
        "Hi",
        "Hello",
        "How many cats?",
        "two",
        "How many dogs?",
        "three",
        "How many pets?",
    ]
    assert thought.tokens == sum(mind.spent.values())
    rare = Scripted(lambda ask, k: "One?" if "not answer" in ask.turns[-1]["content"] else "1")
    few = LeastToMost(parts=3)(rare, [asked("?"), asked("!")])
    assert [t.trace for t in few] == [("One?", "1")] * 2
    assert listed("So:\n* a\n2. b\n\n c ") == ["a", "b", "c"]


def test_what_is_thought_in_private_is_no_plan() -> None:
    """Neither its lines become questions, nor is it told in the answers to them."""

    def say(ask: Ask, k: int) -> str:
        planning = "Do not answer yet" in ask.turns[-1]["content"]
        return "<think>\nhm, what now?\n</think>\n" + ("How many cats?" if planning else "two")

    mind = Scripted(say)
    LeastToMost()(mind, [asked("How many pets?")])
    final = [t["content"] for t in mind.heard[-1].turns]
    assert final == ["How many cats?", "two", "How many pets?"]


# Votes


def test_votes_against_counting() -> None:
    """Against Counter and numpy on random votes; paths without an answer abstain."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = [[None, "a", "b", "c"][i] for i in rng.integers(0, 4, size=9)]
        weights = rng.random(9).tolist()
        given = [a for a in answers if a is not None]
        chosen = answers[elect(answers, [1.0] * 9)]
        most = Counter(given).most_common()
        assert dict(most)[chosen] == most[0][1]
        totals = {a: sum(w for x, w in zip(answers, weights, strict=True) if x == a) for a in given}
        assert answers[elect(answers, weights)] == max(totals, key=totals.__getitem__)
    assert elect([None, None], [1.0, 1.0]) == 0
    assert elect([None, "b", "a", "a", "b"], [9.0, 1.0, 1.0, 1.0, 1.0]) == 1, "the first of a tie"


def test_self_consistency_takes_the_most_frequent_answer() -> None:
    mind = Scripted(lambda ask, k: f"Answer: {[1, 2, 2, 3][k]}")
    (thought,) = SelfConsistency(n=4)(mind, [asked("?")])
    assert thought.answer == "2"
    assert thought.trace == ("Answer: 1", "Answer: 2", "Answer: 2", "Answer: 3")


class Unsure(Scripted):
    """The longer it speaks, the less sure it is."""

    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        rows = super().ask(asks, sampling, n)
        return [[replace(c, logprobs=(-len(c.text),) * len(c.text)) for c in row] for row in rows]


def test_sure_paths_outvote_many() -> None:
    """What is thought in private has no voice; the answer begins as the prompt has it."""
    said = ["<think>Answer: 9</think>", "so: Answer: 2", "or: Answer: 2", "Answer: 3"]
    asks = [asked("?")]
    for vote, answer, place in ((ByLikelihood(), "3", 3), (Majority(), "2", 1)):
        strategy = SelfConsistency(n=4, vote=vote, prompt=ChainOfThought())
        (thought,) = strategy(Unsure(lambda ask, k: said[k]), asks)
        assert thought.answer == answer
        assert thought.trace == tuple(f"Let's think step by step.\n{s}" for s in said)
        assert thought.text == thought.trace[place]
    (best,) = BestOfN(n=4, prompt=ChainOfThought())(Unsure(lambda ask, k: said[k]), asks)
    assert best.text == thought.trace[3]
    (first,) = BestOfN(n=4)(Scripted(lambda ask, k: said[3 - k]), asks)
    assert first.text == said[3], "the first of those that are equally good"


def test_likelihood_is_the_geometric_mean() -> None:
    path = Completion((1, 2), "x", (math.log(0.5), math.log(0.125)), "stop")
    assert ByLikelihood()(path) == pytest.approx(0.25)
    assert ByLikelihood()(Completion((), "", (), "length")) == 0.0


def test_the_surest_is_best_among_those_that_answer() -> None:
    mind = Scripted(lambda ask, k: "")
    texts = ["Answer: 1", "<think>Answer: 2</think>", "Answer: 3"]
    paths = [
        Completion((1,), t, (p,), "stop") for t, p in zip(texts, (-2.0, 0.0, -1.0), strict=True)
    ]
    assert BySureness()(mind, 0, texts, paths) == pytest.approx([np.exp(-2), -1.0, np.exp(-1)])


def test_best_of_n_has_the_closed_form_rate() -> None:
    """With a verifier, N samples that are each right with p solve 1 - (1 - p)^N."""
    rng, p, n, count = np.random.default_rng(1), 0.2, 4, 2000
    mind = Scripted(
        lambda ask, k: f"Answer: {int(rng.random() < p)}",
        verify=lambda i, text: float(text.endswith("1")),
    )
    thoughts = BestOfN(n=n, by=ByVerifier())(mind, [asked("?")] * count)
    rate = sum(t.answer == "1" for t in thoughts) / count
    wanted = 1 - (1 - p) ** n
    assert abs(rate - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / count)


def test_best_of_n_without_verifier_is_named() -> None:
    with pytest.raises(TreadleError, match="have no verifier: choose BySureness"):
        BestOfN(n=2, by=ByVerifier())(Scripted(lambda a, k: "x"), [asked("?")])


# Refinement


def test_refinement_talks_as_in_the_paper() -> None:
    def say(ask: Ask, k: int) -> str:
        said = [t["content"] for t in ask.turns]
        if len(said) == 1:
            return "Answer: 3" if said[0] == "easy" else "Answer: 4"
        if len(said) == 3:
            return "No mistakes." if said[0] == "easy" else "The sum is wrong."
        return "I give up" if said[0] == "lost" else "Answer: 5"

    strategy, mind = CritiqueAndRefine(), Scripted(say)
    easy, hard, lost = strategy(mind, [asked("easy"), asked("hard"), asked("lost")])
    assert (easy.answer, hard.answer, lost.answer) == ("3", "5", "4")
    assert hard.trace == ("Answer: 4", "The sum is wrong.", "Answer: 5")
    assert easy.trace == ("Answer: 3", "No mistakes.")
    refined = next(a for a in mind.heard if a.question == 1 and len(a.turns) == 5)
    assert [t["content"] for t in refined.turns] == [
        "hard",
        "Answer: 4",
        strategy.critique,
        "The sum is wrong.",
        strategy.refine,
    ]
    assert [t["role"] for t in refined.turns] == ["user", "assistant"] * 2 + ["user"]


def test_a_thought_of_no_mistakes_is_no_critique() -> None:
    """What counts is what is said, not what was thought on the way."""
    hidden = {
        "<think>are there no mistakes?</think>The sum is wrong.": "5",
        "<think>The sum is wrong.</think>": "4",
    }
    for critique, answer in hidden.items():

        def say(ask: Ask, k: int, critique: str = critique) -> str:
            return ("Answer: 4", critique, "Answer: 5")[len(ask.turns) // 2]

        (thought,) = CritiqueAndRefine()(Scripted(say), [asked("?")])
        assert thought.answer == answer


def test_refinement_ends_with_the_rounds_or_with_nothing_to_mend() -> None:
    """Each round criticises the answer of the one before; silence is no mistake."""

    def say(ask: Ask, k: int) -> str:
        last, before = ask.turns[-1]["content"], ask.turns[-2:-1]
        if last == "mend":
            return f"Answer: {int(ask.turns[1]['content'][-1]) + 1}"
        if last == "check":
            return " " if before[0]["content"].endswith("3") else "Wrong."
        return f"<think>hm</think>Answer: {last}"

    for rounds, answers in ((1, ["2", "3"]), (2, ["3", "3"]), (5, ["3", "3"])):
        strategy = CritiqueAndRefine(
            rounds=rounds, critique="check", refine="mend", prompt=ChainOfThought()
        )
        found = strategy(Scripted(say), [asked("1"), asked("3")])
        assert [t.answer for t in found] == answers
        assert found[1].trace[0] == "Let's think step by step.\n<think>hm</think>Answer: 3"
        assert found[1].trace[1:] == (" ",)


# Budgets and privacy


@pytest.mark.parametrize("most", [1, 7, 20])
def test_tokens_obey_the_budget(most: int) -> None:
    """A real engine: thinking ends at the budget and the answer at its own."""
    mind = thinker(context=256)
    strategy = ThinkingBudget(most=most, answer=5, sampling=Sampling(temperature=1.0))
    for thought in strategy(mind, [asked("a"), asked("bb"), asked("ccc")]):
        assert thought.tokens <= most + 5
        assert visible(thought.text).startswith("Answer:")


def test_early_stops_are_overruled() -> None:
    mind = Scripted(lambda ask, k: "hm" if ask.prefix.count("</think>") == 0 else " 7")
    (thought,) = ThinkingBudget(most=20, least=6)(mind, [asked("?")])
    assert private(thought.text) == "hm\nWaithm\nWaithm"
    assert thought.answer == "7"
    assert thought.tokens == 6 + 2
    assert thought.text == "<think>\nhm\nWaithm\nWaithm\n</think>\nAnswer: 7"
    with pytest.raises(ValueError, match="least=9 is more than most=5"):
        ThinkingBudget(most=5, least=9)
    assert ThinkingBudget(most=5, least=5).least == 5


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [
        ("<think>\nsecret\n</think>\nAnswer: 1", "Answer: 1", "secret"),
        ("secret\n</think>\nAnswer: 1", "Answer: 1", "secret"),
        ("<think>never ends", "", "never ends"),
        ("before <think>x</think>y<think>z</think> after", "before y after", "x"),
        ("plain", "plain", ""),
        ("secret</think>seen <think>more</think>\n\nend", "seen end", "secret"),
        ("one</think>two</think>seen", "seen", "one"),
        ("<think>a<think>b</think>c</think>seen", "seen", "a<think>b"),
        ("<think>x</think>" * 2000 + "seen", "seen", "x"),
    ],
)
def test_private_reasoning_is_hidden(text: str, shown: str, hidden: str) -> None:
    assert visible(text) == shown
    assert private(text) == hidden


def test_answers_in_private_do_not_count() -> None:
    mind = Scripted(lambda ask, k: "<think>Answer: 1</think>I do not know.")
    assert OneAnswer()(mind, [asked("?")])[0].answer is None


# With an engine


def test_the_engine_gets_the_conversation_and_the_beginning() -> None:
    """Greedy continuation of prompt and prefix equals that of the joined text."""
    mind = thinker(context=256)
    sampling = Sampling(temperature=0.0, max_tokens=8)
    ((found,),) = mind.ask([Ask(0, asked("hi"), "So ")], sampling)
    tokens = tuple(mind.engine.tokenizer.encode("u:hi\na:So "))
    from treadle.inference.request import Request

    ((expected,),) = mind.engine.generate([Request(tokens, sampling)])
    assert found.tokens == expected.tokens
    assert mind.spent == {0: len(found.tokens)}


def test_conversations_that_do_not_fit_are_counted() -> None:
    mind = thinker(context=32)
    short, long = OneAnswer(sampling=Sampling(max_tokens=4))(mind, [asked("a"), asked("b" * 99)])
    assert mind.overflows == 1
    assert long.text == ""
    assert long.tokens == 0
    assert short.tokens == 4


def test_strategies_are_configurations() -> None:
    strategy = SelfConsistency(n=3, prompt=ChainOfThought(), vote=ByLikelihood())
    assert from_yaml(to_yaml(strategy), expect=SelfConsistency) == strategy
