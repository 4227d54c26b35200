"""Text that is written anew while training: by the student (on-policy), or by a teacher.

Each sequence of another source is cut after its prompt, and a writer continues it. Taught by a
teacher (`Taught(source=Rewritten(...))`) and with the student as its writer this is generalised
knowledge distillation: the student is corrected where it really goes, not where the text went.
With the teacher as its writer and hard labels it is sequence-level distillation.

    y ~ p_S(. | x) with probability `share`, else the text's own continuation
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.data.batch import Batch, Piece, assemble
from treadle.data.source import Env, Source, Stream, Work
from treadle.distillation.taught import Teacher
from treadle.inference.engine import Engine
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.nn.modes import evaluating

CARDS = (
    Card(
        id="kd.on_policy",
        paper="Agarwal et al. 2024, GKD, arXiv:2306.13649",
        summary="The student writes, the teacher corrects it token by token.",
        recipe="treadle run distill-ladder",
        oracle="tests/distillation/test_distillation_rewritten.py::test_on_policy_matches_trl",
    ),
    Card(
        id="kd.data",
        paper="Kim and Rush 2016, arXiv:1606.07947",
        summary="The teacher writes what the student learns; what it is unsure of is left out.",
        recipe="treadle run distill-ladder steps.on-policy.source.source.writer='{kind: ByTeacher, "
        "model: {kind: Pretrained, name: smollm2-135m-instruct}}'",
        oracle="tests/distillation/test_distillation_rewritten.py::"
        "test_teacher_writes_what_it_finds_likeliest",
    ),
)

Write = Callable[[Sequence[tuple[int, ...]], int], list[Completion]]
"""(prompts, seed) -> one continuation each."""


class Writer(Config):
    """A shape: who continues prompts."""

    @abstractmethod
    def open(self, env: Env, sampling: Sampling) -> Write:
        """Called before the first step."""


class ByStudent(Writer):
    """The model in training, as it is at each step."""

    def open(self, env: Env, sampling: Sampling) -> Write:
        engine = Engine(env.model, env.tokenizer, autocast=env.autocast)

        def write(prompts: Sequence[tuple[int, ...]], seed: int) -> list[Completion]:
            with evaluating(env.model):
                return _generate(engine, prompts, sampling, seed)

        return write


class ByTeacher(Writer):
    """A frozen model with the student's vocabulary."""

    model: ModelSource

    def open(self, env: Env, sampling: Sampling) -> Write:
        teacher = Teacher(self.model, env)
        teacher.check_vocabulary()
        engine = Engine(teacher.model, teacher.tokenizer, autocast=env.autocast)
        return lambda prompts, seed: _generate(engine, prompts, sampling, seed)


def _generate(
    engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int
) -> list[Completion]:
    requests = [
        Request(prompt, sampling.replace(seed=sampling.seed + seed + i))
        for i, prompt in enumerate(prompts)
    ]
    return [completions[0] for completions in engine.generate(requests)]


class Rewritten(Source):
    """Another source whose sequences are continued by a writer after their prompts."""

    source: Source
    writer: Writer = ByStudent()
    share: float = Field(1.0, gt=0.0, le=1.0)
    """Part of the sequences that is written anew; the rest stays as it is."""
    prompt: int = Field(16, ge=1)
    """Tokens that are kept of a sequence which is learned from its beginning."""
    sampling: Sampling = Sampling(max_tokens=64)
    least_logprob: float | None = Field(None, le=0.0)
    """Continuations whose mean log-probability under their writer is below are not used: the
    text stays as it is."""

    def open(self, env: Env) -> RewrittenStream:
        inner = self.source.open(env)
        return RewrittenStream(self, inner, self.writer.open(env, self.sampling), env)


@dataclass(frozen=True)
class Written:
    """One sequence of a batch on its own."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]
    weights: tuple[float, ...]
    """Of its predictions."""

    def prompt(self, shortest: int) -> tuple[int, ...]:
        """What is before its first prediction, and at least so many tokens."""
        return self.tokens[: max(self.learn.index(True), min(shortest, len(self.tokens) - 1))]


class RewrittenStream(Stream):
    """Its state is that of the source within and the step; the model's own makes the rest."""

    def __init__(self, config: Rewritten, inner: Stream, write: Write, env: Env) -> None:
        self.config, self.inner, self.write, self.env = config, inner, write, env
        self.step = 0

    def __next__(self) -> Work:
        work = next(self.inner)
        rng = np.random.default_rng([self.env.seed, self.env.rank, self.step])
        parts = [sequences(batch) for batch in work.batches]
        tasks = [batch.task for batch in work.batches]
        chosen = [[s for s in part if rng.random() < self.config.share] for part in parts]
        prompts = [s.prompt(self.config.prompt) for part in chosen for s in part]
        seed = int(rng.integers(1 << 31))
        written = dict(
            zip(
                (id(s) for part in chosen for s in part),
                self.write(prompts, seed) if prompts else [],
                strict=True,
            )
        )
        used = {i: c for i, c in written.items() if self._good(c)}
        self.step += 1
        batches = tuple(
            replace(self._batch(part, used), task=task)
            for part, task in zip(parts, tasks, strict=True)
        )
        lengths = [len(c.tokens) for c in written.values()]
        metrics = {
            "written_tokens": float(np.mean(lengths)) if lengths else 0.0,
            "written_kept": len(used) / len(written) if written else 0.0,
        }
        return replace(work, batches=batches, metrics={**work.metrics, **metrics})

    def _good(self, completion: Completion) -> bool:
        least = self.config.least_logprob
        return least is None or float(np.mean(completion.logprobs)) >= least

    def _batch(self, part: list[Written], written: Mapping[int, Completion]) -> Batch:
        """What is written anew weighs, a token, what the text's own tokens did."""
        pieces: list[Piece] = []
        weights: list[float] = []
        for sequence in part:
            completion = written.get(id(sequence))
            if completion is None:
                pieces.append(Piece(sequence.tokens, sequence.learn))
                weights += sequence.weights
                continue
            prompt = sequence.prompt(self.config.prompt)
            tokens = (*prompt, *completion.tokens)
            pieces.append(Piece(tokens, [i >= len(prompt) for i in range(len(tokens))]))
            weights += [float(np.mean(sequence.weights))] * len(completion.tokens)
        return replace(assemble(pieces), weights=torch.tensor(weights))

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "inner": self.inner.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.inner.restore(state["inner"])


def sequences(batch: Batch) -> list[Written]:
    """Each sequence of predictions with all that is before it; shared prompts are repeated."""
    found: list[Written] = []
    tokens, sources = batch.tokens.tolist(), batch.sources.tolist()
    owners = batch.sequences.tolist()
    for number in range(batch.sequence_count):
        rows = [i for i, owner in enumerate(owners) if owner == number]
        last = sources[rows[-1]]
        segment = max(s for s, start in enumerate(batch.layout.starts) if start <= last)
        path = [t for s in batch.layout.lineage(segment) for t in batch.layout.span(s)]
        end = path.index(last) + 1
        places = {path.index(sources[i]) + 1: batch.targets[i].item() for i in rows}
        whole = [*(tokens[t] for t in path[:end]), places[end]]
        found.append(
            Written(
                tuple(int(t) for t in whole),
                tuple(i in places for i in range(end + 1)),
                tuple(batch.weights[rows].tolist()),
            )
        )
    return found
