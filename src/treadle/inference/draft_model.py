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
from treadle.inference.propose import Width, propose
from treadle.inference.runner import Batch, Name, Runner
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
    widths: tuple[Width, ...] = ()
    """How many tokens to try at the first, the second ... guess of each path; 1 behind them."""

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
        model = loaded.model.requires_grad_(False).eval()
        return ModelGuesser(model, runner, tokenizer, self.tokens, self.widths)


class EarlyExit(Draft):
    """The model's own first layers, then its last norm and head: self-speculation."""

    layers: int = Field(ge=1)
    tokens: int = Field(3, ge=1)
    """Guesses at a time."""
    widths: tuple[Width, ...] = ()
    """How many tokens to try at the first, the second ... guess of each path; 1 behind them."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        if not isinstance(runner, TorchRunner):
            raise TreadleError(
                f"EarlyExit needs a model in plain torch, not {type(runner).__name__}: take NGram"
            )
        early = first_layers(runner.model, self.layers)
        return ModelGuesser(early, runner, tokenizer, self.tokens, self.widths)


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


@dataclass
class _Path:
    """A continuation that grows."""

    of: int
    """Which sequence it continues."""
    known: _Known
    text: list[int]
    guesses: list[int] = field(default_factory=list)


class ModelGuesser(Guesser):
    """A model with as many pages as the one it guesses for."""

    def __init__(
        self,
        model: DecoderModel,
        runner: Runner,
        tokenizer: Tokenizer,
        tokens: int,
        widths: tuple[int, ...] = (),
    ) -> None:
        self.tokens, self.widths, self.stops = tokens, widths, tokenizer.stop_ids
        autocast = runner.autocast if isinstance(runner, TorchRunner) else nullcontext
        self.runner = TorchRunner(
            model, pages=runner.pages, page=runner.page, cache=Gathered(), autocast=autocast
        )
        self.blocks = Blocks(runner.pages, runner.page)
        self.known: dict[Name, _Known] = {}

    def forget(self) -> None:
        for name in list(self.known):
            self.blocks.release(self.known.pop(name).table)

    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[list[int]]]:
        for name in self.known.keys() - {s.name for s in sequences}:
            self.blocks.release(self.known.pop(name).table)
        paths: list[_Path] = []
        counts = []
        for i, (sequence, count) in enumerate(zip(sequences, most, strict=True)):
            counts.append(min(self.tokens, count, self.runner.context - sequence.length))
            known = self.known.setdefault(sequence.name, _Known())
            if counts[i] > 0 and self._make_room(known, sequence.length + counts[i]):
                paths.append(_Path(i, known, sequence.slice(0, sequence.length)))
        forks: list[_Path] = []
        for depth in range(self.tokens):
            going = [path for path in (*paths, *forks) if depth < counts[path.of]]
            if not going:
                break
            wide = self.widths[depth] if depth < len(self.widths) else 1
            forks += self._grow(sequences, going, wide)
        for path in forks:
            self.blocks.release(path.known.table)
        found: list[list[list[int]]] = [[] for _ in sequences]
        for path in (*paths, *forks):
            found[path.of].append(path.guesses)
        return found

    def _grow(self, sequences: Sequence[Active], going: Sequence[_Path], wide: int) -> list[_Path]:
        """A token more for each path; paths that part from them with other tokens."""
        behind = [(sequences[path.of], path.guesses) for path in going]
        tokens = propose(self._read(going), behind, self.stops, wide)
        forks: list[_Path] = []
        for path, (token, *others) in zip(going, tokens, strict=True):
            for other in others:
                known = self._fork(path)
                if known is not None:
                    more = [*path.guesses, other]
                    forks.append(_Path(path.of, known, [*path.text, other], more))
            path.guesses.append(token)
            path.text.append(token)
        return forks

    def _make_room(self, known: _Known, length: int) -> bool:
        need = -(-length // self.blocks.page) - len(known.table)
        if need > self.blocks.available:
            return False
        known.table += [self.blocks.take() for _ in range(need)]
        return True

    def _fork(self, path: _Path) -> _Known | None:
        """What is known of a path, for another that goes on from it; None where pages lack."""
        full, held = divmod(len(path.text), self.blocks.page)
        shared = path.known.table[:full]
        known = _Known(list(path.text), list(shared))
        if not self._make_room(known, len(path.known.table) * self.blocks.page):
            return None
        self.blocks.hold(shared)
        if held:
            self.runner.copy(path.known.table[full], known.table[full])
        return known

    def _read(self, paths: Sequence[_Path]) -> Float[Tensor, "B V"]:
        """Logits behind each text, of which only what is new is computed."""
        starts = []
        for path in paths:
            seen, text = path.known.tokens, path.text
            same = next((i for i, (a, b) in enumerate(zip(seen, text)) if a != b), len(seen))  # noqa: B905
            starts.append(min(same, len(text) - 1))
            path.known.tokens = list(text)
        return self.runner.run(
            Batch(
                tokens=[t for path, at in zip(paths, starts, strict=True) for t in path.text[at:]],
                counts=[len(path.text) - at for path, at in zip(paths, starts, strict=True)],
                starts=starts,
                tables=[path.known.table for path in paths],
                outputs=[1] * len(paths),
            )
        )
