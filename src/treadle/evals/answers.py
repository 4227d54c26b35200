"""How well a model foretells the answers of conversations: exp of their mean surprise a token.

    exp(-sum log p(answer token | all before it) / n)

It needs no verifier, so it serves where nobody can say what is right, only what was said; and no
generation, so it is quick. It is training's own loss, on conversations that were not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.results import Figure
from treadle.data.batch import Piece, assemble, within_budget
from treadle.data.records import Chat
from treadle.data.supervised import Conversations
from treadle.evals.statistics import ratio
from treadle.evals.task import Benchmark, Done, Item, Record, Subject
from treadle.kernels.linear_cross_entropy import token_logprobs
from treadle.nn.linear import bias_of
from treadle.objectives.objective import head_rule
from treadle.tokenizers.chat import EveryTurn, Turns, encode_chat


@dataclass(frozen=True)
class ChatItem(Item):
    """A conversation."""

    chat: Chat


class Answers(Benchmark):
    """Perplexity of the assistant's tokens; give it conversations that nobody trained on."""

    name: str = "answers"
    conversations: Conversations
    limit: int | None = Field(100, ge=1)
    longest: int = Field(1024, ge=2)
    """Conversations are cut to this many tokens."""
    turns: Turns = EveryTurn()

    def items(self) -> Sequence[ChatItem]:
        count = self.conversations.count()
        amounts = [n for n in (self.limit, count) if n is not None]
        return [ChatItem(i, "", self.conversations.conversation(i)) for i in range(min(amounts))]

    @torch.no_grad()
    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, ChatItem)]
        pieces = [self._piece(subject, item.chat) for item in asked]
        for run in within_budget([len(p.tokens) for p in pieces], subject.tokens):
            batch = assemble([pieces[i] for i in run])
            with subject.autocast():
                hidden = subject.model(batch.tokens, batch.context())[batch.sources]
                found = token_logprobs(
                    hidden,
                    subject.model.head_weight(),
                    batch.targets,
                    bias=bias_of(subject.model.head),
                    rule=head_rule(subject.model),
                )
            sums = iter(batch.per_sequence(found).tolist())
            counts = iter(batch.per_sequence(torch.ones_like(found)).tolist())
            for i in run:
                answered = any(pieces[i].learn[1:])  # else it is no sequence of the batch
                metrics = {
                    "log_likelihood": next(sums) if answered else 0.0,
                    "tokens": next(counts) if answered else 0.0,
                }
                done(asked[i], Record({}, metrics))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        answered = [r.metrics for r in records if r.metrics["tokens"]]
        if not answered:
            raise TreadleError(
                f"task `{self.name}`: no conversation has an answer within its first "
                f"{self.longest} tokens: raise `longest`, or look at the data"
            )
        surprise = [-m["log_likelihood"] for m in answered]
        tokens = [m["tokens"] for m in answered]
        return {"perplexity": ratio(surprise, tokens, np.exp, "perplexity")}

    def _piece(self, subject: Subject, chat: Chat) -> Piece:
        encoded = encode_chat(
            subject.tokenizer,
            [m.plain() for m in chat.messages],
            tools=chat.tools or None,
            turns=self.turns,
        )
        end = min(self.longest, subject.model.config.context)
        return Piece(encoded.ids[:end], encoded.mask[:end])
