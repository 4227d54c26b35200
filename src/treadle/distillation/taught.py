"""A source whose batches carry what a teacher makes of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError
from treadle.data.batch import Batch
from treadle.data.source import Env, Source, Stream, Work
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, fingerprint
from treadle.nn.linear import bias_of
from treadle.objectives.distil import TaughtBatch
from treadle.objectives.observe import check_layer, observe
from treadle.tokenizers.load import tokenizer_of
from treadle.tokenizers.tokenizer import Tokenizer


class Teacher:
    """A frozen model that is opened when it is first asked, in the run's precision."""

    def __init__(self, source: ModelSource, env: Env) -> None:
        if env.workspace is None:
            raise TreadleError("a teacher is opened within a run: give Env a workspace")
        self.source, self.env, self.workspace = source, env, env.workspace

    @cached_property
    def _opened(self) -> tuple[DecoderModel, Tokenizer]:
        opened = self.source.open(self.workspace)
        model = opened.model.eval().requires_grad_(False).to(self.env.device)
        return model, tokenizer_of(opened)

    @property
    def model(self) -> DecoderModel:
        return self._opened[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._opened[1]

    @property
    def identity(self) -> str:
        """A digest of where it comes from and of its files' content; without opening it."""
        return fingerprint(self.source, self.workspace)[:16]

    def check_vocabulary(self) -> None:
        """Raise TreadleError where student and teacher do not number the same tokens alike.

        Templates, and which tokens end a text, may differ: the text is the student's.
        """
        env, vocab = self.env, self.model.config.vocab
        if vocab != env.model.config.vocab or _spellings(self.tokenizer) != _spellings(
            env.tokenizer
        ):
            raise TreadleError(
                f"the teacher has a vocabulary of its own ({vocab} tokens, the student has "
                f"{env.model.config.vocab}), so their distributions cannot be compared token by "
                "token: take a teacher of the student's family, cut the student out of the "
                "teacher (Thinned), or compare them rank by rank: OtherTokenizer as the lesson "
                "and RankedLabels as the term"
            )


def _spellings(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.spelling(token) for token in range(tokenizer.vocab_size)]


class Pupil(Protocol):
    """What adds a teacher's part to batches."""

    def __call__(self, batch: Batch, step: int) -> TaughtBatch: ...

    def settle(self) -> None:
        """Put what is not on the disk yet there."""


class Lesson(Config):
    """A shape: what the teacher gives, and how it comes by it."""

    @abstractmethod
    def open(self, teacher: Teacher, env: Env) -> Pupil:
        """Called before the first step."""


class Live(Lesson):
    """The teacher runs beside the student, once a batch."""

    states: tuple[int, ...] = ()
    """Layers of the teacher whose outputs it gives (0 is the first block)."""
    attention: int | None = Field(None, ge=0)
    """Layer whose queries, keys and values it gives."""

    def open(self, teacher: Teacher, env: Env) -> Pupil:
        teacher.check_vocabulary()
        for layer in (*self.states, *(() if self.attention is None else (self.attention,))):
            try:
                check_layer(teacher.model, layer)
            except ConfigError as error:
                raise ConfigError(f"Live, of the teacher: {error}") from None
        return LivePupil(self, teacher.model, env.device, env.autocast)


class LivePupil:
    """Asks a frozen model about every batch."""

    def __init__(
        self,
        config: Live,
        teacher: DecoderModel,
        device: str,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.config, self.teacher = config, teacher
        self.device, self.autocast = device, autocast

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int) -> TaughtBatch:
        model, wanted = self.teacher, self.config.attention
        here = batch.to(self.device)
        with self.autocast():
            seen = observe(
                model,
                here,
                states=self.config.states,
                attention=() if wanted is None else (wanted,),
            )
        states = [seen.states[layer] for layer in self.config.states]
        looked = None if wanted is None else seen.attention[wanted]
        return taught(
            here,
            step=step,
            teacher_hidden=seen.hidden[here.sources],
            teacher_head=model.head_weight(),
            teacher_bias=bias_of(model.head),
            teacher_softcap=model.config.softcap,
            teacher_states=torch.stack(states) if states else None,
            teacher_q=looked.q if looked else None,
            teacher_k=looked.k if looked else None,
            teacher_v=looked.v if looked else None,
            teacher_scale=looked.rule.scale if looked else 1.0,
        )

    def settle(self) -> None:
        return


def taught(batch: Batch, **given: Any) -> TaughtBatch:
    """The batch with a teacher's part."""
    return TaughtBatch(**{f.name: getattr(batch, f.name) for f in fields(Batch)}, **given)


class Taught(Source):
    """Another source, taught by a teacher."""

    source: Source
    teacher: ModelSource
    lesson: Lesson = Live()

    def open(self, env: Env) -> TaughtStream:
        inner = self.source.open(env)
        return TaughtStream(inner, self.lesson.open(Teacher(self.teacher, env), env))


class TaughtStream(Stream):
    """Its state is that of the source within, and the step."""

    def __init__(self, inner: Stream, pupil: Pupil) -> None:
        self.inner, self.pupil, self.step = inner, pupil, 0

    def __next__(self) -> Work:
        work = next(self.inner)
        batches = tuple(self.pupil(batch, self.step) for batch in work.batches)
        self.step += 1
        return replace(work, batches=batches)

    def state(self) -> dict[str, Any]:
        self.pupil.settle()
        return {"step": self.step, "inner": self.inner.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.inner.restore(state["inner"])
