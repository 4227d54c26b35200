"""Negotiation: the rules against all plays of small deals, schooling, and self-play that pays."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.advantages import GroupCentred
from treadle.alignment.episodes import Environment, Heard, Play, Seat
from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.negotiation import (
    Bargaining,
    Deal,
    Negotiation,
    ScriptedDeals,
    offer_of,
    offer_text,
    script,
)
from treadle.alignment.played import Lane, Played, lanes_batch, lanes_of
from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.core.results import accuracy
from treadle.data.records import Messages, assistant, user
from treadle.data.source import Env
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel, LinearHead
from treadle.models.llama import tiny_llama
from treadle.models.source import ModelSource, Opened
from treadle.objectives.policy import GRPO, PerToken
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.tokenizers.chat import encode_prompt
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)
SMALL = tuple("abcdefghijklm ")


def play(deal: Deal, said: list[str], offers: int = 4) -> Heard:
    bargaining = Bargaining(Negotiation(offers=offers), deal)
    seat, heard = 0, Heard(0)
    for words in said:
        assert heard.next == seat
        heard = bargaining.hear(seat, words)
        seat = 1 - seat
    return heard


def test_payoffs_are_those_of_the_rules() -> None:
    """Every share of a small deal, offered by either seat and accepted by the other."""
    deal = Deal((2, 1, 3), ((1, 5, 0), (2, 2, 4)))
    for share in itertools.product(range(3), range(2), range(4)):
        rest = (2 - share[0], 1 - share[1], 3 - share[2])
        mine = (share[0] + 5 * share[1]) / 7
        theirs = (2 * rest[0] + 2 * rest[1] + 4 * rest[2]) / 18
        found = play(deal, [offer_text(share), "I accept that."])
        assert found.next is None
        assert found.rewards == pytest.approx((mine, theirs))
        other = play(deal, [offer_text((0, 0, 0)), offer_text(share), "Accept."])
        mine = (rest[0] + 5 * rest[1]) / 7
        theirs = (2 * share[0] + 2 * share[1] + 4 * share[2]) / 18
        assert other.rewards == pytest.approx((mine, theirs))


@pytest.mark.parametrize(
    "said",
    [
        ["Accept."],
        ["I want it all"],
        ["Take 3 hats, 0 books, 0 balls."],
        ["Take 1 hats, 0 books."],
        ["Take 1 hats, 1 hats, 0 books, 0 balls."],
        [offer_text((1, 1, 1))] * 4,
    ],
)
def test_without_agreement_there_is_nothing(said: list[str]) -> None:
    deal = Deal((2, 1, 3), ((1, 5, 0), (2, 2, 4)))
    assert play(deal, said) == Heard(None, rewards=(0.0, 0.0))


def test_offers_are_read_as_they_are_written() -> None:
    assert offer_text((2, 0, 1)) == "Take 2 hats, 0 books, 1 balls."
    for share in itertools.product(range(3), range(2), range(4)):
        assert offer_of(offer_text(share), (2, 1, 3)) == share
    assert offer_of("Take 1 balls, 2 hats, 0 books", (2, 1, 3)) == (2, 0, 1)
    assert offer_of(offer_text((1,)), (2,)) == (1,)


def test_the_other_hears_and_worth_stays_private() -> None:
    game = Negotiation(seed=4)
    heard = game.begin(0).hear(0, offer_text((0, 0, 0)))
    assert heard.next == 1
    assert heard.told == {1: "The other says: Take 0 hats, 0 books, 0 balls."}
    deal = game.deal(7)
    for seat, (message,) in enumerate(game.openings(7)):
        for name, count, worth in zip(
            ("hats", "books", "balls"), deal.counts, deal.worth[seat], strict=True
        ):
            assert f"{count} {name} (worth {worth} each)" in message.content


def test_held_out_deals_are_others() -> None:
    deals = {Negotiation().deal(i) for i in range(200)}
    held = {Negotiation(held_out=True).deal(i) for i in range(200)}
    assert len(deals) > 190
    assert len(deals & held) < 4
    assert Negotiation().deal(3) == Negotiation().deal(3) != Negotiation(seed=1).deal(3)
    for deal in deals:
        assert all(any(worth) for worth in deal.worth)


def test_scripts_keep_the_rules() -> None:
    """Both conversations of a play tell one story, which ends in a deal more often than not.

    A player takes what is left to it where that is half of its all, and less in later turns; it
    asks for what it likes before what it does not.
    """
    game, agreed = Negotiation(), 0
    liked, disliked = [], []
    for number in range(60):
        spoken = script(game, number, random.Random(f"0/{number}"))
        deal = game.deal(number)
        for turn, said in enumerate(spoken):
            left = offer_of(spoken[turn - 1], deal.counts) if turn else None
            fair = left is not None and deal.payoff(turn % 2, deal.rest(left)) >= 0.5 - 0.15 * turn
            assert (said == "Accept.") == fair
            wanted = offer_of(said, deal.counts)
            for place, n in enumerate(wanted or ()):
                side = liked if deal.worth[turn % 2][place] > 2 else disliked
                side.append(n / deal.counts[place])
        heard = play(game.deal(number), spoken)
        assert heard.next is None or len(spoken) == game.offers
        agreed += sum(heard.rewards) > 0
        first, second = (
            ScriptedDeals().conversation(2 * number + seat).messages for seat in (0, 1)
        )
        assert [m.content for m in first[1:] if m.role == "assistant"] == spoken[0::2]
        assert [m.content for m in second[1:] if m.role == "assistant"] == spoken[1::2]
        assert second[1].content == f"The other says: {spoken[0]}"
    assert agreed > 40
    assert 0.5 < sum(liked) / len(liked) < 0.7
    assert 0.3 < sum(disliked) / len(disliked) < 0.5


WORDS = ("Accept.", *(offer_text((n,)) for n in range(4)))
GAME = Negotiation(kinds=1, most=3, offers=3)


def phrases() -> Tokenizer:
    """What is said over one kind of thing is one token each, so that all plays can be counted."""
    briefing = ("Divide with another: ", " hats (worth ", " each). Say what you take, or ")
    rest = ("accept what is left to you.\n", "You speak first.", "The other ", "speaks first.")
    backend = byte_tokenizer().backend
    heard = (word.removesuffix(".") for word in WORDS)
    backend.add_tokens([*WORDS, *heard, *briefing, *rest])
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
    return Tokenizer(backend, special=SpecialTokens(eos="<end>")).with_template(template)


def speaker(tokenizer: Tokenizer, words: Sequence[str]) -> DecoderModel:
    """Says each of these words as likely as the others, and nothing else."""
    torch.manual_seed(0)
    decoder = tiny_llama(tokenizer.vocab_size, dim=32, layers=1, heads=2, hidden=64, context=128)
    model = decoder.replace(head=LinearHead(bias=True)).build()
    with torch.no_grad():
        model.head.bias.fill_(-1e4)
        model.head.bias[[token(tokenizer, word) for word in words]] = 0.0
    return model


def token(tokenizer: Tokenizer, word: str) -> int:
    (found,) = tokenizer.encode(word)
    return found


def chances(model: DecoderModel, prompt: Sequence[int]) -> torch.Tensor:
    """log pi of every token after these."""
    return model.logits(model(torch.tensor(prompt))[-1:])[0].log_softmax(-1)


class Payoffs(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report.metrics.get("reward", 0.0))


def train(env: Env, source, objective, steps: int, lr: float, folder: Path) -> list[float]:
    plan, payoffs = SingleProcess(), Payoffs()
    fit(
        env.model,
        source.open(env),
        objective,
        optimizer=AdamW(lr=lr),
        schedule=Constant(),
        config=Fit(steps=steps, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder,
        hooks=[payoffs],
    )
    return payoffs.seen


def self_play() -> Played:
    return Played(
        environment=GAME,
        prompts=4,
        completions=8,
        sampling=Sampling(max_tokens=4, stop=(".",)),
        turns=3,
    )


class Whispers(Environment):
    """The second seat hears the first where its words begin with an even sign, and answers."""

    def openings(self, index: int) -> tuple[Messages, ...]:
        return ((user(f"first {index}"),), (user(f"second {index}"),))

    def begin(self, index: int) -> Play:
        return Whispered()


class Whispered(Play):
    def hear(self, seat: int, said: str) -> Heard:
        if seat == 1 or ord(said[:1] or "a") % 2:
            return Heard(None, rewards=(len(said) / 10, 1 - len(said) / 10))
        return Heard(1, told={1: said})


def test_each_seat_learns_from_its_own_payoff(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path)
    source = self_play().replace(
        environment=Whispers(), prompts=8, sampling=Sampling(max_tokens=40, stop=SMALL)
    )
    episodes = source.open(env).roll()
    lanes = lanes_of(episodes, 8)
    assert all(sum(bool(seat.logprobs) for seat in lane.seats) > 1 for lane in lanes)
    order = {id(seat): place for e in episodes for place, seat in enumerate(e.seats)}
    assert len(lanes) > 8
    for lane in lanes:
        assert len({order[id(seat)] for seat in lane.seats}) == 1
    silent = [s for lane in lanes for s in lane.seats if not s.logprobs]
    assert silent
    batch = lanes_batch(lanes, [lane.rewards for lane in lanes], 1.0)
    spoke = [s for lane in lanes for s in lane.seats if s.logprobs]
    assert batch.sequence_count == len(spoke)
    # The batch's order is by prompt: each sequence has the reward of its own seat.
    values = batch.per_sequence(batch.advantages) / batch.per_sequence(batch.weights)
    assert sorted(values.tolist()) == pytest.approx(sorted(s.reward for s in spoke), abs=1e-5)
    for e in episodes:
        if e.seats[1].logprobs:
            assert e.seats[1].messages[1].content == e.seats[0].messages[1].content


def test_a_seat_that_never_spoke_moves_nothing() -> None:
    told = ((1.0, 1), (0.0, 0), (0.5, 2))
    seats = [Seat([], reward=r, logprobs=[0.0] * spoke) for r, spoke in told]
    assert Lane(tuple(seats)).rewards == [1.0, 0.75, 0.5]


# All plays of two words about three hats, and what they bring each seat.
TAKE, YES = offer_text((2,)), "Accept."
PLAYS = {
    (YES,): (0, 0),
    (TAKE, YES): (2 / 3, 1 / 3),
    (TAKE, TAKE, YES): (1 / 3, 2 / 3),
    (TAKE, TAKE, TAKE): (0, 0),
}
Said = tuple[str, ...]


@dataclass(eq=False)
class Scripted:
    """Says what it is told to say, and remembers what it was asked."""

    model: DecoderModel
    tokenizer: Tokenizer
    asked: dict[Said, tuple[int, ...]] = field(default_factory=dict)
    lines: tuple[Said, ...] = ()
    turn: int = 0

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        groups: dict[Said, list[str]] = {}
        for line in self.lines:
            if len(line) > self.turn:
                groups.setdefault(line[: self.turn], []).append(line[self.turn])
        self.turn += 1
        assert not self.model.training
        assert [r.n for r in requests] == [len(words) for words in groups.values()]
        self.asked |= {b: r.prompt for b, r in zip(groups, requests, strict=True)}
        return [[self.say(word, b) for word in words] for b, words in groups.items()]

    def say(self, word: str, before: Said) -> Completion:
        logprobs = (self.known(word, before),)
        return Completion((token(self.tokenizer, word),), word, logprobs, "stop")

    @cache  # noqa: B019
    def known(self, word: str, before: Said) -> float:
        return self.chance(word, before).item()

    def chance(self, word: str, before: Said) -> torch.Tensor:
        return chances(self.model, self.asked[before])[token(self.tokenizer, word)]

    def likelihood(self, line: Said) -> float:
        return math.exp(sum(self.known(word, line[:i]) for i, word in enumerate(line)))


def test_each_seat_climbs_its_own_expected_payoff(tmp_path: Path) -> None:
    """What a step follows, averaged over all groups of three plays, is dJ in closed form.

    Seat s climbs J_s, the other's words held fixed. Of G plays k hear seat 1: centring makes of
    the exact gradients (G - 1) dJ_0 and E[max(k - 1, 0)] / P(it speaks) dJ_1.
    """
    tokenizer = phrases()
    model = speaker(tokenizer, (TAKE, YES))
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.5)  # so that what was said counts
    parameters, scripted = list(model.parameters()), Scripted(model, tokenizer)
    deal = next(i for i in itertools.count() if GAME.deal(i).counts == (3,))
    source = self_play().replace(prompts=1, completions=3, advantage=GroupCentred())
    stream = source.open(Env(model=model, tokenizer=tokenizer, scratch=tmp_path))
    stream.table = replace(stream.table, speaker=replace(stream.table.speaker, sample=scripted))

    found = [torch.zeros_like(p) for p in parameters]
    for lines in itertools.product(PLAYS, repeat=3):
        if len({PLAYS[line] for line in lines}) == 1:
            continue  # teaches nothing, and would be drawn anew
        scripted.lines, scripted.turn, stream.drawn = lines, 0, deal
        (batch,) = next(stream).batches
        assert model.training
        output = GRPO(normalisation=PerToken())(model, batch)
        assert float(output.metrics["mismatch"]) < 1e-4
        weight = math.prod(scripted.likelihood(line) for line in lines)
        for total, part in zip(found, torch.autograd.grad(output.total, parameters), strict=True):
            total -= weight * part
    assert sum(scripted.likelihood(line) for line in PLAYS) == pytest.approx(1.0, abs=1e-5)

    speaks = 1 - scripted.likelihood((YES,))
    factors = 2.0, (3 * speaks - 1 + (1 - speaks) ** 3) / speaks
    goal = torch.zeros(())
    for line, payoffs in PLAYS.items():
        words = [scripted.chance(word, line[:i]) for i, word in enumerate(line)]
        for seat in (0, 1):
            own = sum(words[seat::2], torch.zeros(()))
            others = sum(words[1 - seat :: 2], torch.zeros(())).detach()
            goal = goal + factors[seat] * payoffs[seat] * (own + others).exp()
    for (name, _), mine, exact in zip(
        model.named_parameters(), found, torch.autograd.grad(goal, parameters), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def expected(seats: Sequence[DecoderModel], tokenizer: Tokenizer, number: int) -> torch.Tensor:
    """Payoffs of the two seats, over everything that they can say."""
    total = torch.zeros(2)

    def goes_on(told: tuple[Messages, ...], said: Said, chance: float) -> None:
        seat = len(said) % 2
        prompt = encode_prompt(tokenizer, [m.plain() for m in told[seat]])
        likely = chances(seats[seat], prompt).exp()
        for word in WORDS:
            now = chance * float(likely[token(tokenizer, word)])
            heard = play(GAME.deal(number), [*said, word], GAME.offers)
            if heard.next is None:
                total.add_(torch.tensor(heard.rewards), alpha=now)
                continue
            words = word.removesuffix(".")
            further = [(*told[seat], assistant(words))]
            further.append((*told[1 - seat], user(f"The other says: {words}")))
            goes_on((further[seat], further[1 - seat]), (*said, word), now)

    goes_on(GAME.openings(number), (), 1.0)
    return total


def test_self_play_pays(tmp_path: Path) -> None:
    """Either seat then gets twice as much and more from the model as it was before."""
    tokenizer = phrases()
    model, start = speaker(tokenizer, WORDS), speaker(tokenizer, WORDS)
    env = Env(model=model, tokenizer=tokenizer, scratch=tmp_path)
    train(env, self_play(), GRPO(), 24, 5e-3, tmp_path / "play")
    deals = [next(i for i in itertools.count() if GAME.deal(i).counts == (n,)) for n in (1, 2, 3)]

    def mean(*seats: DecoderModel) -> torch.Tensor:
        return torch.stack([expected(seats, tokenizer, number) for number in deals]).mean(0)

    before, first, second = mean(start, start), mean(model, start), mean(start, model)
    assert float(first[0]) > 2 * float(before[0])
    assert float(second[1]) > 2 * float(before[1])


class Always(ModelSource):
    """Says the same whatever it hears."""

    word: str

    def open(self, workspace: Workspace) -> Opened:
        tokenizer = phrases()
        folder = workspace.folder / "tokenizer"
        tokenizer.save(folder)
        return Opened(speaker(tokenizer, (self.word,)), folder)


def measured(folder: Path, **changes: object) -> tuple[dict, list[dict]]:
    step = MeasurePlayed(
        name="measure", subject="base", model=Always(word=YES), played=self_play(), what="payoff",
        count=37, precision=FP32(),
    ).replace(**changes)  # fmt: skip
    execute(Pipeline(name="p", steps=(step,)), folder)
    rows = (folder / "measure/samples.jsonl").read_text().splitlines()
    return read_manifest(folder / "measure")["metrics"], [json.loads(row) for row in rows]


def test_an_opponent_tells_a_better_bargainer(tmp_path: Path) -> None:
    """One takes two hats and the other says yes: known payoffs, from both seats."""
    takes, accepts = Always(word=TAKE), Always(word=YES)
    alone, _ = measured(tmp_path / "alone", model=takes)
    assert alone["results"]["payoff"]["value"] == 0
    assert alone["results"].keys() == {"payoff"}
    assert alone["results"]["payoff"]["n"] == 37, "two seats of a play are no two plays"

    # Whoever says yes first gets nothing; two hats can only be taken where there are two.
    deals = [GAME.deal(i).counts[0] for i in range(37)]
    first = [2 / n if n > 1 else 0 for n in deals]
    second = [(n - 2) / n if n > 1 else 0 for n in deals]
    for name, mine, theirs in (("takes", first, second), ("accepts", second, first)):
        model, opponent = (takes, accepts) if name == "takes" else (accepts, takes)
        metrics, rows = measured(tmp_path / name, model=model, opponent=opponent)
        zeros = [0.0] * 37
        results = metrics["results"]
        assert results == {
            "payoff": pytest.approx(accuracy([*mine, *zeros])),
            "payoff: the opponent's": pytest.approx(accuracy([*theirs, *zeros])),
        }
        assert metrics["problems_left_out"] == 0
        assert len({row["problem"] for row in rows}) == 74
        assert sum(row["score"] for row in rows) == pytest.approx(sum(mine))
        for row in rows:
            place = int(row["problem"][-1])
            number = int(row["problem"].split("-")[1])
            opening = GAME.openings(number)[place][0].content
            assert row["prompt"].startswith(f"user: {opening}")
            spoken = row["answer"].removeprefix("assistant: ").split("\n")[0]
            # The second to speak says nothing where the first gave up or asked for too much.
            over = name == "takes" or deals[number] == 1
            assert spoken == ("" if place == 1 and over else model.word.removesuffix("."))


def test_a_game_of_one_has_no_opponent(tmp_path: Path) -> None:
    class Alone(Whispers):
        def openings(self, index: int) -> tuple[Messages, ...]:
            return ((user("alone"),),)

    with pytest.raises(TreadleError, match="measure: the environment has one seat: no `opponent`"):
        measured(
            tmp_path, opponent=Always(word=YES), played=self_play().replace(environment=Alone())
        )
