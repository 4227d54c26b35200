"""Guesses by the model's own heads: from the hidden state of the last token, no further pass.

The hidden state h_i whose logits gave token i + 1 is kept. Head k says from it token i + 1 + k,
which is guess k behind the last known token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.propose import Width, propose
from treadle.inference.runner import Name, Runner
from treadle.inference.sequence import Active
from treadle.inference.speculative import Draft, Guesser
from treadle.inference.torch_runner import TorchRunner
from treadle.models.mtp import AheadHeads, heads_of
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.speculative.mtp",
    paper="Cai et al. 2024, Medusa, arXiv:2401.10774; DeepSeek-V3, arXiv:2412.19437",
    summary="Guesses by heads that the model was trained with, without another pass.",
    recipe="treadle generate runs/quickstart-scratch 'Return a list of' --draft MTPHeads",
    oracle="tests/inference/test_inference_mtp.py::test_text_is_that_of_plain_decoding",
)


class MTPHeads(Draft):
    """The heads that `MTP` gave to the model."""

    widths: tuple[Width, ...] = ()
    """How many tokens to try at the first, the second ... guess of each path; 1 behind them."""
    tokens: int | None = Field(None, ge=1)
    """Guesses at a time; None: as many as there are heads."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        if not isinstance(runner, TorchRunner):
            raise TreadleError(
                f"MTPHeads needs a model in plain torch, not {type(runner).__name__}: take NGram, "
                "or --device cpu"
            )
        if runner.advance is not None:
            raise ConfigError(
                "MTPHeads guesses from hidden states, which a compiled step keeps to itself: "
                "leave EngineConfig.decode (--decode) out"
            )
        heads = heads_of(runner.model)
        if heads is None:
            raise ConfigError(
                "MTPHeads: the model has no heads ahead: train it with the transform MTP and the "
                "objective MultiToken, or take NGram or EarlyExit"
            )
        if not heads.config.head.local:
            raise ConfigError(
                f"MTPHeads: heads of kind {type(heads.config.head).__name__} attend to the whole "
                "text, of which nothing is kept for them: train with MedusaHead or ChainedLayer "
                "to guess, or take EarlyExit"
            )
        if self.tokens is not None and self.tokens > heads.config.heads:
            raise ConfigError(
                f"MTPHeads: tokens={self.tokens}, but the model has {heads.config.heads} heads"
            )
        return HeadGuesser(self, runner, heads, tokenizer)


@dataclass
class _Path:
    """A continuation that grows."""

    of: int
    hidden: Float[Tensor, " D"]
    token: int
    guesses: list[int] = field(default_factory=list)


class HeadGuesser(Guesser):
    def __init__(
        self, draft: MTPHeads, runner: TorchRunner, heads: AheadHeads, tokenizer: Tokenizer
    ) -> None:
        self.draft, self.runner, self.heads = draft, runner, heads
        self.stops = tokenizer.stop_ids
        self.hidden: dict[Name, Float[Tensor, " D"]] = {}

    def saw(self, sequences: Sequence[Active], rows: Sequence[int]) -> None:
        for sequence, row in zip(sequences, rows, strict=True):
            self.hidden[sequence.name] = self.runner.hidden[row].clone()

    def forget(self) -> None:
        self.hidden.clear()

    @torch.inference_mode()
    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[list[int]]]:
        known = {s.name: self.hidden[s.name] for s in sequences if s.name in self.hidden}
        self.hidden = known
        paths = [
            _Path(i, known[s.name], s.tokens[-1])
            for i, s in enumerate(sequences)
            if s.name in known
        ]
        for depth, layer in enumerate(list(self.heads.layers)[: self.draft.tokens]):
            widths = self.draft.widths
            wide = widths[depth] if depth < len(widths) else 1
            going = [path for path in paths if depth < most[path.of]]
            if not going:
                break
            with self.runner.autocast():
                embedded = self.runner.model.embedding(
                    torch.tensor([path.token for path in going], device=self.runner.device)
                )
                ahead = layer(torch.stack([path.hidden for path in going]), embedded, None)
                logits = self.runner.model.logits(ahead).float()
            tokens = propose(
                logits, [(sequences[path.of], path.guesses) for path in going], self.stops, wide
            )
            chained = self.heads.config.head.chained
            for path, state, (token, *others) in zip(list(going), ahead, tokens, strict=True):
                hidden = state if chained else path.hidden
                paths += [_Path(path.of, hidden, t, [*path.guesses, t]) for t in others]
                path.hidden, path.token = hidden, token
                path.guesses.append(token)
        found: list[list[list[int]]] = [[] for _ in sequences]
        for path in paths:
            found[path.of].append(path.guesses)
        return found
