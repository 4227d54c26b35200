"""One completion under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from treadle.inference.constraint import Constraint
from treadle.inference.detokenizer import Detokenizer
from treadle.inference.guesses import Guesses
from treadle.inference.request import Completion, Finish, Reading, Request
from treadle.inference.runner import Name


@dataclass(eq=False)
class Active:
    """A completion: what it has said so far, and where its keys and values lie."""

    request: Request
    index: int
    """Which of the request's n."""
    job: int
    text: Detokenizer
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: Finish | None = None
    constraint: Constraint | None = None
    mark: bytes = b""
    """Names the weights of the request's adapter."""
    table: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in pages."""
    keys: list[bytes] = field(default_factory=list)
    """Names of the full pages among those."""
    cached: int = 0
    """Prompt tokens that were found in the prefix cache when the sequence was admitted."""
    forks: list[Active] = field(default_factory=list)
    """The request's other completions, until they part from this one after the prompt."""

    readings: list[Reading] = field(default_factory=list)
    """Of the prompt's tokens but the first, where they are asked for."""
    guesses: Guesses = field(default_factory=lambda: Guesses([]))
    """What runs in this pass behind the last known token."""

    @property
    def name(self) -> Name:
        return (self.job, self.index)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who comes first where room is short."""
        return (-self.request.priority, self.job, self.index)

    @property
    def length(self) -> int:
        """Tokens known, prompt and answer."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def pending(self) -> int:
        """Known tokens that have not been computed."""
        return self.length - self.computed

    @property
    def reads(self) -> bool:
        """Whether readings of its prompt are asked for and not complete."""
        wanted = self.request.prompt_logprobs is not None
        return wanted and len(self.readings) < len(self.request.prompt) - 1

    def slice(self, start: int, stop: int) -> list[int]:
        """Known tokens from one position to another."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.tokens[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.tokens[: max(0, stop - len(prompt))]]

    def end(self, finish: Literal["stop", "length", "cancelled"]) -> None:
        """No more tokens."""
        if self.finish is None:
            self.finish = finish
            self.text.finish()

    def completion(self) -> Completion:
        """What was said, once it is finished."""
        assert self.finish is not None
        return Completion(
            tokens=tuple(self.tokens),
            text=self.text.text,
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            top_logprobs=tuple(self.top),
            cached_tokens=self.cached,
            prompt=tuple(self.readings),
        )
