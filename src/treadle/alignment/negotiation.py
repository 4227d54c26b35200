"""Negotiation by self-play: two seats divide things that each values in its own way.

Each seat knows how many things there are and what one of each is worth to itself. In turn they say
what they would take, or accept what the other left them:

    Take 2 hats, 0 books, 1 balls.          Accept.

With the last offer accepted, a seat's payoff is its share of the worth of everything to it; without
an agreement both get nothing. The one policy plays both seats and learns from both.
Lewis et al. 2017, Deal or No Deal?, arXiv:1706.05125; Liu et al. 2025, SPIRAL, arXiv:2506.24119
(self-play on multi-turn games with advantages by seat).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pydantic import Field

from treadle.alignment.episodes import Environment, Heard, Play
from treadle.core.cards import Card
from treadle.data.records import Chat, Message, Messages, assistant, user
from treadle.data.supervised import Conversations

CARD = Card(
    id="al.multi_agent",
    paper="Lewis et al. 2017, arXiv:1706.05125; Liu et al. 2025, SPIRAL, arXiv:2506.24119",
    summary="Self-play between two seats of one policy on a negotiation, advantages by seat.",
    recipe="treadle run negotiate",
    oracle="tests/alignment/test_alignment_negotiation.py::test_each_seat_climbs_its_own_expected_payoff",
)
THINGS = ("hats", "books", "balls")
HELD_OUT = 2**20
"""Numbers of deals that are held out begin here."""
_NUMBER = re.compile(r"(\d+)\s+(\w+)")
_ACCEPT = re.compile(r"\baccept\b", re.IGNORECASE)

Share = tuple[int, ...]


@dataclass(frozen=True)
class Deal:
    """What there is, and what one of each is worth to each seat."""

    counts: Share
    worth: tuple[Share, Share]

    def payoff(self, seat: int, share: Share) -> float:
        """Worth of a share over the worth of everything."""
        return _dot(self.worth[seat], share) / _dot(self.worth[seat], self.counts)

    def rest(self, share: Share) -> Share:
        return tuple(c - s for c, s in zip(self.counts, share, strict=True))


class Negotiation(Environment):
    """Deals over hats, books and balls, without end."""

    kinds: int = Field(3, ge=1, le=3)
    """Kinds of things."""
    most: int = Field(3, ge=1)
    """Of each kind there are so many at most."""
    offers: int = Field(4, ge=2)
    """Utterances after which there is no agreement any more."""
    seed: int = 0
    held_out: bool = False
    """Take deals that are never trained on."""

    def deal(self, index: int) -> Deal:
        draw = random.Random(f"{self.seed}/{index + HELD_OUT * self.held_out}")
        things = range(self.kinds)
        counts = tuple(draw.randint(1, self.most) for _ in things)
        first, second = (tuple(draw.randint(0, 5) for _ in things) for _ in range(2))
        # Worth nothing at all would make a payoff of 0 / 0.
        worth = tuple(w if any(w) else (1,) * self.kinds for w in (first, second))
        return Deal(counts, (worth[0], worth[1]))

    def openings(self, index: int) -> tuple[Messages, ...]:
        deal = self.deal(index)
        return (
            (user(f"{briefing(deal, 0)}\nYou speak first."),),
            (user(f"{briefing(deal, 1)}\nThe other speaks first."),),
        )

    def begin(self, index: int) -> Play:
        return Bargaining(self, self.deal(index))


class Bargaining(Play):
    """One negotiation: the offer on the table, and whose it is."""

    def __init__(self, config: Negotiation, deal: Deal) -> None:
        self.config, self.deal = config, deal
        self.offer: Share | None = None
        self.said = 0

    def hear(self, seat: int, said: str) -> Heard:
        self.said += 1
        if _ACCEPT.search(said):
            if self.offer is None:
                return Heard(None, rewards=(0.0, 0.0))
            payoffs = [0.0, 0.0]
            payoffs[1 - seat] = self.deal.payoff(1 - seat, self.offer)
            payoffs[seat] = self.deal.payoff(seat, self.deal.rest(self.offer))
            return Heard(None, rewards=tuple(payoffs))
        self.offer = offer_of(said, self.deal.counts)
        if self.offer is None or self.said == self.config.offers:
            return Heard(None, rewards=(0.0, 0.0))
        return Heard(1 - seat, told={1 - seat: f"The other says: {said.strip()}"})


def briefing(deal: Deal, seat: int) -> str:
    """What a seat knows."""
    things = ", ".join(
        f"{count} {name} (worth {worth} each)"
        for count, name, worth in zip(deal.counts, THINGS, deal.worth[seat], strict=False)
    )
    return f"Divide with another: {things}. Say what you take, or accept what is left to you."


def offer_text(share: Share) -> str:
    """An offer as a seat makes it."""
    return f"Take {', '.join(f'{n} {name}' for n, name in zip(share, THINGS, strict=False))}."


def offer_of(said: str, counts: Share) -> Share | None:
    """What a speaker takes; None where it does not name each thing once, or takes what is not
    there."""
    found = [(name, int(number)) for number, name in _NUMBER.findall(said)]
    wanted = dict(found)
    names = THINGS[: len(counts)]
    if len(found) != len(counts) or set(wanted) != set(names):
        return None
    share = tuple(wanted[name] for name in names)
    return share if all(s <= c for s, c in zip(share, counts, strict=True)) else None


class ScriptedDeals(Conversations):
    """Negotiations of players who take what they like best and accept half: a first schooling.

    Each play is two conversations, one from each seat.
    """

    negotiation: Negotiation = Negotiation()
    amount: int = Field(512, ge=2)
    seed: int = 0

    def conversation(self, index: int) -> Chat:
        number, seat = divmod(index, 2)
        spoken = script(self.negotiation, number, random.Random(f"{self.seed}/{number}"))
        messages: list[Message] = list(self.negotiation.openings(number)[seat])
        for turn, said in enumerate(spoken):
            own = turn % 2 == seat
            messages.append(assistant(said) if own else user(f"The other says: {said}"))
        if messages[-1].role == "user":
            messages.pop()
        return Chat(tuple(messages))

    def count(self) -> int | None:
        return self.amount


def script(negotiation: Negotiation, number: int, draw: random.Random) -> list[str]:
    """What two such players say."""
    deal = negotiation.deal(number)
    said: list[str] = []
    offer: Share | None = None
    for turn in range(negotiation.offers):
        seat = turn % 2
        if offer is not None and deal.payoff(seat, deal.rest(offer)) >= 0.5 - 0.15 * turn:
            return [*said, "Accept."]
        greed = draw.uniform(0.3, 0.9)
        offer = tuple(
            sum(draw.random() < (greed if worth > 2 else 1 - greed) for _ in range(count))
            for count, worth in zip(deal.counts, deal.worth[seat], strict=True)
        )
        said.append(offer_text(offer))
    return said


def _dot(a: Share, b: Share) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))
