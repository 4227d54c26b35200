"""Guesses by a smaller model of the same vocabulary, or by the first layers of the model itself.

A guess is drawn as the engine will draw the token, by the same random number, from the smaller
model's distribution. Its keys and values have pages of their own; what was refused is overwritten.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.blocks import Blocks
from treadle.inference.paged_memory import Gathered
from treadle.inference.penalties import adjust
from treadle.inference.runner import Batch, Name, Runner
from treadle.inference.sampling import sample
from treadle.inference.sequence import Active
from treadle.inference.speculative import Draft, Guesser
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="inf.speculative.model",
    paper="Leviathan et al. 2023, arXiv:2211.17192; Elhoushi et al. 2024, LayerSkip, "
    "arXiv:2404.16710",
    summary="Guesses by a smaller model, or by the first layers of the model itself.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' "
    "--draft '{kind: EarlyExit, layers: 20}'",
    oracle="tests/inference/test_inference_speculative.py::test_text_is_that_of_plain_decoding",
)


class DraftModel(Draft):
    """A smaller model that shares the vocabulary."""

    model: str
    """As in `treadle generate`."""
    tokens: int = Field(4, ge=1)
    """Guesses at a time."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        from treadle.models.hub.load import load_model
        from treadle.models.hub.pull import pull
        from treadle.models.source import Opened
        from treadle.tokenizers.load import tokenizer_of

        path = pull(self.model).path
        loaded = load_model(path, dtype=torch.float32)
        theirs = tokenizer_of(Opened(loaded.model, path, loaded.metadata))
        if theirs.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise ConfigError(
                f"DraftModel: {self.model} has another vocabulary than the model that it is to "
                "guess for: take one of the same family, or NGram"
            )
        return ModelGuesser(
            loaded.model.requires_grad_(False).eval(), runner, tokenizer, self.tokens
        )


class EarlyExit(Draft):
    """The model's own first layers, then its last norm and head: self-speculation."""

    layers: int = Field(ge=1)
    tokens: int = Field(3, ge=1)
    """Guesses at a time."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        if not isinstance(runner, TorchRunner):
            raise TreadleError(
                f"EarlyExit needs a model in plain torch, not {type(runner).__name__}: take NGram"
            )
        return ModelGuesser(first_layers(runner.model, self.layers), runner, tokenizer, self.tokens)


def first_layers(model: DecoderModel, layers: int) -> DecoderModel:
    """The model without its later layers, over the same weights.

    Raises:
        ConfigError: it has not as many and one more.
    """
    if layers >= len(model.blocks):
        raise ConfigError(
            f"EarlyExit: layers={layers} is not fewer than the model's {len(model.blocks)}"
        )
    early = copy.copy(model)
    early._modules = {**model._modules, "blocks": nn.ModuleList(list(model.blocks)[:layers])}
    early.config = model.config.replace(blocks=model.config.blocks[:layers])
    return early


@dataclass
class _Known:
    """What the smaller model has read of a sequence."""

    tokens: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)


class ModelGuesser(Guesser):
    """A model with as many pages as the one it guesses for."""

    def __init__(
        self, model: DecoderModel, runner: Runner, tokenizer: Tokenizer, tokens: int
    ) -> None:
        self.tokens, self.stops = tokens, tokenizer.stop_ids
        autocast = runner.autocast if isinstance(runner, TorchRunner) else nullcontext
        self.runner = TorchRunner(
            model, pages=runner.pages, page=runner.page, cache=Gathered(), autocast=autocast
        )
        self.blocks = Blocks(runner.pages, runner.page)
        self.known: dict[Name, _Known] = {}

    def forget(self) -> None:
        for name in list(self.known):
            self._release(name)

    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[int]]:
        for name in self.known.keys() - {s.name for s in sequences}:
            self._release(name)
        guesses: list[list[int]] = [[] for _ in sequences]
        going = {}
        for i, (sequence, count) in enumerate(zip(sequences, most, strict=True)):
            count = min(self.tokens, count, self.runner.context - sequence.length)
            if count > 0 and self._make_room(sequence, count):
                going[i] = count
        texts = {i: sequences[i].slice(0, sequences[i].length) for i in going}
        while going:
            logits = self._read([(sequences[i].name, texts[i]) for i in going])
            for row, i in zip(logits, going, strict=True):
                request, said = sequences[i].request, [*sequences[i].tokens, *guesses[i]]
                adjust(row, request.sampling, request.prompt, said, self.stops)
            drawn = sample(
                logits,
                [sequences[i].request.sampling for i in going],
                streams=[sequences[i].index for i in going],
                steps=[len(sequences[i].tokens) + len(guesses[i]) for i in going],
            )
            for i, token in zip(list(going), drawn.tokens.tolist(), strict=True):
                guesses[i].append(token)
                texts[i].append(token)
                if len(guesses[i]) == going[i]:
                    del going[i]
        return guesses

    def _make_room(self, sequence: Active, count: int) -> bool:
        known = self.known.setdefault(sequence.name, _Known())
        need = -(-(sequence.length + count) // self.blocks.page) - len(known.table)
        if need > self.blocks.available:
            return False
        known.table += [self.blocks.take() for _ in range(need)]
        return True

    def _read(self, work: Sequence[tuple[Name, list[int]]]) -> Float[Tensor, "B V"]:
        """Logits behind each text, of which only what is new is computed."""
        starts = []
        for name, text in work:
            seen = self.known[name].tokens
            same = next((i for i, (a, b) in enumerate(zip(seen, text)) if a != b), len(seen))  # noqa: B905
            starts.append(min(same, len(text) - 1))
            self.known[name].tokens = list(text)
        return self.runner.run(
            Batch(
                tokens=[t for (_, text), at in zip(work, starts, strict=True) for t in text[at:]],
                counts=[len(text) - at for (_, text), at in zip(work, starts, strict=True)],
                starts=starts,
                tables=[self.known[name].table for name, _ in work],
                outputs=[1] * len(work),
            )
        )

    def _release(self, name: Name) -> None:
        self.blocks.release(self.known.pop(name).table)
