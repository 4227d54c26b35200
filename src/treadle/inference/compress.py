"""Prompt compression: leave out the tokens that a model could have guessed.

A text is read in segments s_1, s_2, ... Behind what was kept of the earlier ones, each token of a
segment has a surprise

    I(t_i) = -log p(t_i | kept(s_1) ... kept(s_{j-1}), t_1 ... t_{i-1} of s_j)

and kept(s_j) are the most surprising tokens, in their order, `rate` of the segment. A segment is
scored whole, so a token is judged by neighbours that may go themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.branches import Branches
from treadle.inference.engine import Engine

CARD = Card(
    id="inf.prompt_compress",
    paper="Jiang et al. 2023, LLMLingua, arXiv:2310.05736; Li et al. 2023, Selective Context, "
    "arXiv:2310.06201",
    summary="Leaves out the tokens of a long prompt that the model could have guessed.",
    recipe="treadle generate smollm2-135m-instruct --compress 0.5 < prompt.txt",
    oracle="tests/inference/test_inference_compress.py::test_equals_the_definition",
)


class CompressPrompt(Config):
    """Which tokens of a text stay."""

    rate: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the tokens that stay, rounded up in each segment."""
    segment: int = Field(64, ge=1)
    """Tokens that are judged together."""
    keep: tuple[str, ...] = ("\n",)
    """A token with one of these strings stays, as special tokens do; both count in the share."""

    def __call__(self, engine: Engine, tokens: Sequence[int]) -> list[int]:
        """The tokens that stay, judged by the engine's own model.

        Raises:
            TreadleError: what stays, and a segment behind it, exceeds the model's context. Or the
                engine's cache keeps no pages that last.
        """
        branches = Branches(engine.runner, engine.scheduler.blocks)
        kept: list[int] = []
        root = branches.open(())
        try:
            for start in range(0, len(tokens), self.segment):
                segment = list(tokens[start : start + self.segment])
                _check(len(kept) + len(segment), engine.runner.context)
                unread = kept[root.length :]
                ahead = branches.run([(root, unread, 1)]) if unread else None
                trial = branches.fork(root)
                try:
                    logits = branches.run([(trial, segment, len(segment))])
                finally:
                    branches.close(trial)
                surprise = [math.inf if ahead is None else _surprise(ahead, segment[:1])[0]]
                surprise += _surprise(logits[:-1], segment[1:])
                kept += self._choose(engine, segment, surprise)
        finally:
            branches.close(root)
        return kept

    def _choose(self, engine: Engine, segment: list[int], surprise: list[float]) -> list[int]:
        count = math.ceil(self.rate * len(segment))
        stays = {i for i, token in enumerate(segment) if self._fixed(engine, token)}
        for i in sorted(range(len(segment)), key=lambda i: -surprise[i]):
            if len(stays) >= count:
                break
            stays.add(i)
        return [segment[i] for i in sorted(stays)]

    def _fixed(self, engine: Engine, token: int) -> bool:
        if token in engine.tokenizer.special_ids:
            return True
        text = engine.tokenizer.token_bytes(token)
        return any(mark.encode() in text for mark in self.keep)


def compress_text(engine: Engine, text: str, way: CompressPrompt) -> str:
    """A prompt with its last paragraph as it is, and the rest compressed.

    Raises:
        TreadleError: there is but one paragraph.
    """
    body, blank, question = text.rpartition("\n\n")
    if not body.strip():
        raise TreadleError(
            "compression leaves the last paragraph as it is, and there is no other: put a blank "
            "line between the text and what is asked of it"
        )
    tokens = way(engine, engine.tokenizer.encode(body, parse_special=False))
    return engine.tokenizer.decode(tokens) + blank + question


def _surprise(logits: Float[Tensor, "n V"], tokens: list[int]) -> list[float]:
    logp = logits.float().log_softmax(-1)
    return [-float(row[token]) for row, token in zip(logp, tokens, strict=True)]


def _check(length: int, context: int) -> None:
    if length > context:
        raise TreadleError(
            f"what stays of the prompt and the segment behind it are {length} tokens, but the "
            f"model's context is {context}: lower CompressPrompt.rate, or shorten the prompt"
        )
