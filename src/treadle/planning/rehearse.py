"""A training step rehearsed without numbers: what it will need in memory and in work.

    resident = base + what the heap keeps of (weights + optimiser states + gradients + activations
                    + temporaries)

The parts are not formulas: the model is built, rewritten by its transforms, put through the
objective, backward and the optimiser as in a run, on tensors that have shapes and no memory, and a
ledger counts what is alive. So every technique, its recomputation, its precision and its fused
kernels count as they are, and a new one needs no entry anywhere.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from treadle.core.cards import Card
from treadle.core.config import to_yaml
from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Pipeline, read_manifest
from treadle.core.progress import Progress, Silent
from treadle.data.batch import Batch
from treadle.data.corpus import TextCorpus
from treadle.data.texts import TextFiles
from treadle.distillation.cached import Cached, likeliest
from treadle.distillation.taught import Live, LivePupil, taught
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh
from treadle.models.transform import Transform, transformed
from treadle.objectives.causal import CausalLM
from treadle.objectives.objective import Objective
from treadle.optim.adamw import AdamW
from treadle.optim.optimizer import Optimizer
from treadle.planning.heap import held
from treadle.planning.ledger import Ledger, rehearsing
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.precision import FP32, Precision
from treadle.train.run import Run
from treadle.train.tokenizer import TrainTokenizer

CARD = Card(
    id="plan.memory",
    paper="Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; Korthikanti et al. 2022, "
    "arXiv:2205.05198",
    summary="Memory, time and disk of a run, from a rehearsal of its step without numbers.",
    recipe="treadle plan smollm2-135m-instruct --records 1000",
    oracle="tests/planning/test_planning_measured.py::test_peak_is_within_ten_percent",
)
SCRATCH = 0.05
"""What kernels take for themselves, of the bytes that are alive: reordered weights, buffers of
threads."""
WORKERS = 2
"""Rehearsals at a time."""
STEPS = 2
"""The first makes the optimiser's states; the second has them from the beginning."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, how, and on how much at a time."""

    decoder: Decoder
    batches: tuple[Batch, ...]
    """Micro-batches of a step; two stand for any number, for the memory's sake."""
    transforms: tuple[Transform, ...] = ()
    objective: Objective = field(default_factory=CausalLM)
    optimizer: Optimizer = field(default_factory=lambda: AdamW(lr=1e-4))
    precision: Precision = field(default_factory=FP32)
    teacher: Decoder | None = None
    """A frozen model that reads the same batches in every step."""
    lesson: Live | Cached = field(default_factory=Live)
    """What it gives; of `Cached` the first epoch, in which it is asked."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of a step, in bytes and operations."""

    parameters: int
    trained: int
    weights: int
    """Bytes, those of a teacher included."""
    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps at the end of a forward pass."""
    temporaries: int
    """What else is alive at the highest moment."""
    loading: int
    """Highest moment before the first step, as of dense weights that are then packed."""
    flops: int
    """Of one step."""
    heap: int
    """What the heap of tensors holds at its highest: what lives, and the holes between."""
    base: int = 0
    """Resident memory of a run without a model to speak of: libraries, tokenizer, hooks."""

    @property
    def alive(self) -> int:
        """Bytes of tensors at the highest moment."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.temporaries)
        return max(self.loading, sum(parts))

    @property
    def resident(self) -> int:
        """Highest resident memory of a run on a CPU."""
        return self.base + self.heap + round(SCRATCH * self.alive)


def rehearse_all(jobs: Sequence[Job], progress: Progress = Silent()) -> list[Needs]:
    """What each job needs.

    In processes of their own: what kernels keep for the next call would have no numbers in it.

    Raises:
        TreadleError: nothing trains, or a transform does not fit the model.
    """
    context = multiprocessing.get_context("spawn")
    found: list[Needs] = []
    base = _base()
    with (
        ProcessPoolExecutor(min(WORKERS, len(jobs)), mp_context=context) as pool,
        progress.task("rehearsing", len(jobs)) as task,
    ):
        for needs in pool.map(rehearse, jobs):
            found.append(replace(needs, base=base))
            task.update(len(found))
    return found


def _base() -> int:
    """Of `treadle run` with a model of next to no size: libraries, tokenizer, hooks, checkpoints.

    Raises:
        TreadleError: the run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, recipe = folder / "text.txt", folder / "base.yaml"
        text.write_text("\n".join(f"The number after {i} is {i + 1}." for i in range(500)))
        documents = TextFiles(path=str(text), separator="\n")
        tokenizer = TrainTokenizer(documents=documents, tokenizer=ByteLevelBPE(vocab_size=300))
        run = Run(
            model=Fresh(decoder=tiny_llama(300, dim=32, layers=1), step=tokenizer.name),
            source=TextCorpus(documents=documents, context=32, tokens_per_step=64),
            objective=CausalLM(),
            optimizer=AdamW(lr=1e-4),
            fit=Fit(steps=STEPS, precision=FP32()),
        )
        write_text(recipe, to_yaml(Pipeline(name="base", steps=(tokenizer, run))))
        command = [
            sys.executable,
            "-m",
            "treadle",
            "run",
            str(recipe),
            "--dir",
            str(folder / "run"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise TreadleError(f"a run of a tiny model failed:\n{done.stderr[-2000:]}")
        return int(read_manifest(folder / "run" / run.name)["cost"]["peak_bytes"])


def rehearse(job: Job) -> Needs:
    """Build, rewrite and train the model for two steps, in a process that does nothing else."""
    for batch in job.batches:
        _ = batch.layout.positions, batch.layout.buckets  # what decides shapes has to have numbers
    with rehearsing() as ledger:
        model = job.decoder.build()
        teacher = None if job.teacher is None else job.teacher.build().requires_grad_(False)
        model = transformed(model, job.transforms)
        loading = ledger.peak
        job.precision.prepare(model)
        if teacher is not None:
            job.precision.prepare(teacher)
        return _trained(job, model.train(), teacher, ledger, loading=loading)


def _trained(
    job: Job,
    model: DecoderModel,
    teacher: DecoderModel | None,
    ledger: Ledger,
    *,
    loading: int,
) -> Needs:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise TreadleError("nothing trains: a transform has frozen every parameter")
    optimizer = job.optimizer.build(named)
    weights = ledger.alive
    states = gradients = kept = flops = 0
    for _ in range(STEPS):
        states = ledger.alive - weights
        ledger.mark()
        flops = -ledger.flops
        for batch in job.batches:
            before = ledger.alive
            asked = batch if teacher is None else _taught(job, teacher, batch)
            with job.precision.autocast("cpu"):
                total = job.objective(model, asked).total
                kept = max(kept, ledger.alive - before)
            total.backward()
            del total, asked
        gradients = sum(p.grad.nbytes for _, p in named if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        flops += ledger.flops
    rest = ledger.peak - weights - gradients - states - kept
    return Needs(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for _, p in named),
        weights=weights,
        gradients=gradients,
        optimizer=states,
        activations=kept,
        temporaries=max(0, rest),
        loading=loading,
        flops=flops,
        heap=held(ledger.requests),
    )


def _taught(job: Job, teacher: DecoderModel, batch: Batch) -> Batch:
    match job.lesson:
        case Live():
            autocast = partial(job.precision.autocast, "cpu")
            return LivePupil(job.lesson, teacher, "cpu", autocast)(batch, 0)
        case Cached(temperature=temperature):
            with job.precision.autocast("cpu"):
                tokens, logprobs = likeliest(job.lesson, teacher, batch)
            return taught(
                batch,
                step=0,
                top_tokens=tokens.int(),
                top_logprobs=logprobs.float(),
                top_temperature=temperature,
            )
