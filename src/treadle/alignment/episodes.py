"""Episodes: rollouts over several turns, with tools, in an environment, or among several seats.

The model speaks, the environment answers, the model goes on from the same tokens: what it said is
never tokenised anew. Its own tokens are learned; what others said stands between them, masked.
Where several seats talk to each other, the one policy plays them all, and each seat learns from
its own reward against the same seat in the other plays of its group.

    J = sum_{seats} sum_{t : own} min(r_t A, clip(r_t) A),    A by (problem, seat)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from treadle.alignment.samplers import Sample
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.rating import OvertimeError, time_limit
from treadle.data.records import Message, Messages, assistant, user
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.tokenizers.chat import encode_prompt
from treadle.tokenizers.tokenizer import Tokenizer

SPOKEN = "\x02spoken\x03"
"""Stands for what a seat said while a template is asked for what comes after it."""


@dataclass(frozen=True)
class Heard:
    """What follows an utterance."""

    next: int | None
    """The seat that speaks now; None: it is over."""
    told: Mapping[int, str] = field(default_factory=dict)
    """What seats are told before they speak again."""
    rewards: tuple[float, ...] = ()
    """Of all seats, where there are any yet."""
    failure: str = ""
    """What went wrong in the environment or a tool, though it goes on."""


class Play(ABC):
    """One play of an environment's problem."""

    @abstractmethod
    def hear(self, seat: int, said: str) -> Heard:
        """What comes of it that a seat said something."""


class Environment(Config):
    """A shape: problems that are worked on in turns. Seat 0 speaks first."""

    @abstractmethod
    def openings(self, index: int) -> tuple[Messages, ...]:
        """What each seat is told before problem number `index`."""

    @abstractmethod
    def begin(self, index: int) -> Play:
        """A new play of problem number `index`."""


@dataclass
class Seat:
    """What one seat heard and said, as messages and as tokens."""

    messages: list[Message]
    prompt: tuple[int, ...] = ()
    """Up to its first words; empty before them."""
    tokens: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0

    def ready(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """All its tokens, up to where it is to speak."""
        if not self.prompt:
            self.prompt = tuple(encode_prompt(tokenizer, [m.plain() for m in self.messages]))
        else:
            heard = heard_tokens(tokenizer, self.messages, self.tokens[-1])
            self.tokens += heard
            self.learned += [False] * len(heard)
        return (*self.prompt, *self.tokens)

    def forget_unanswered(self) -> None:
        """Leave out what was heard after its last words, which has no room."""
        while self.learned and not self.learned[-1]:
            self.learned.pop()
            self.tokens.pop()

    def speak(self, tokens: Sequence[int], logprobs: Sequence[float], text: str) -> None:
        self.tokens += tokens
        self.learned += [True] * len(tokens)
        self.logprobs += logprobs
        self.messages.append(assistant(text))


@dataclass
class Episode:
    """A play under way."""

    number: int
    copy: int
    """Which of the group's plays of the problem."""
    play: Play
    seats: tuple[Seat, ...]
    speaker: int | None = 0
    turns: int = 0
    cut_off: bool = False
    """It ended in the middle of a turn, or for want of turns or of context."""
    failures: list[str] = field(default_factory=list)

    @property
    def place(self) -> int:
        """The policy's seat where another model has the others: in each copy the next one."""
        return self.copy % len(self.seats)

    def hear(self, said: str, patience: float) -> None:
        """Tell the environment; whatever it does, the run goes on."""
        assert self.speaker is not None
        sound: list[bool] = []
        try:
            with time_limit(patience):
                heard = self.play.hear(self.speaker, said)
            sound += map(math.isfinite, heard.rewards)
        except TreadleError:
            raise
        except (Exception, OvertimeError) as error:  # an environment may fail in any way
            heard = Heard(None, failure=f"{type(error).__name__}: {error}"[:200])
        if heard.failure:
            self.failures.append(heard.failure)
        for seat, reward, finite in zip(self.seats, heard.rewards, sound, strict=False):
            # What is no number teaches nothing.
            if finite:
                seat.reward += reward
            else:
                self.failures.append(f"the reward was {reward}")
        for place, text in heard.told.items():
            self.seats[place].messages.append(user(text))
        self.speaker = heard.next


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that speaks."""

    tokenizer: Tokenizer
    context: int
    sample: Sample


@dataclass(frozen=True)
class Table:
    """Where episodes are played: an environment, and who speaks for its seats."""

    environment: Environment
    speaker: Speaker
    sampling: Sampling
    turns: int
    """Utterances of an episode at most."""
    patience: float
    """Seconds after which an environment or a tool is given up."""
    opponent: Speaker | None = None
    """Speaks for all seats but `Episode.place`."""

    def play(self, numbers: Sequence[int], copies: int, seed: int) -> list[Episode]:
        """Every problem `copies` times, all side by side; those whose opening fills the context
        are left out."""
        episodes = [
            Episode(
                number=n,
                copy=copy,
                play=self.environment.begin(n),
                seats=tuple(Seat(list(opening)) for opening in self.environment.openings(n)),
            )
            for n in numbers
            for copy in range(copies)
        ]
        going = episodes
        while going:
            going = self._round(going, seed)
        return [e for e in episodes if e.turns]

    def _round(self, going: list[Episode], seed: int) -> list[Episode]:
        """One utterance of each; those that are not over yet."""
        asked: dict[Speaker, dict[tuple[int, tuple[int, ...]], list[Episode]]] = {}
        for episode in going:
            assert episode.speaker is not None
            mine = self.opponent is None or episode.speaker == episode.place
            speaker = self.speaker if mine else self.opponent
            assert speaker is not None
            ready = episode.seats[episode.speaker].ready(speaker.tokenizer)
            if len(ready) >= speaker.context:
                episode.seats[episode.speaker].forget_unanswered()
                episode.cut_off, episode.speaker = True, None
            else:
                alike = asked.setdefault(speaker, {})
                alike.setdefault((episode.number, ready), []).append(episode)
        for speaker, alike in asked.items():
            requests = [
                Request(prompt, self._seeded(rows[0], seed), n=len(rows))
                for (_, prompt), rows in alike.items()
            ]
            for rows, completions in zip(alike.values(), speaker.sample(requests), strict=True):
                for episode, completion in zip(rows, completions, strict=True):
                    self._said(episode, completion)
        return [e for e in going if e.speaker is not None]

    def _said(self, episode: Episode, completion: Completion) -> None:
        assert episode.speaker is not None
        seat = episode.seats[episode.speaker]
        seat.speak(completion.tokens, completion.logprobs, completion.text)
        episode.turns += 1
        episode.hear(completion.text, self.patience)
        if episode.speaker is not None and (
            completion.finish == "length" or episode.turns >= self.turns
        ):
            episode.cut_off, episode.speaker = True, None

    def _seeded(self, first: Episode, seed: int) -> Sampling:
        """Other draws in every turn and for every prompt, the same in every run."""
        words = [self.sampling.seed, seed, first.number, first.copy, first.turns]
        drawn = np.random.SeedSequence([w % 2**32 for w in words]).generate_state(1)[0]
        return self.sampling.replace(seed=int(drawn) // 2)


def heard_tokens(tokenizer: Tokenizer, messages: Sequence[Message], last: int) -> list[int]:
    """Tokens between the last of what a seat said and where it speaks again.

    Args:
        last: the token that its words ended with; where that ends the turn, it is not repeated.

    Raises:
        TreadleError: the template changes what was said, so that nothing can be put behind it.
    """
    said = max(i for i, m in enumerate(messages) if m.role == "assistant")
    marked = [m.plain() for m in messages]
    marked[said] = assistant(SPOKEN).plain()
    text = tokenizer.render(marked, add_generation_prompt=True)
    _, found, behind = text.partition(SPOKEN)
    if not found:
        raise TreadleError(
            "the chat template does not repeat what the assistant said, so a conversation of "
            "several turns cannot go on from its own tokens: use a plain one, such as CHATML"
        )
    if last in tokenizer.stop_ids:
        behind = behind.removeprefix(tokenizer.spelling(last))
    return tokenizer.encode(behind)
