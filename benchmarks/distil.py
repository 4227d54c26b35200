"""A distillation step: the teacher's likeliest tokens from the disk beside a teacher that runs.

SmolLM2-135M teaches a student of some of its 30 layers, 1024 tokens a step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import race

ROWS, WIDTH, STEPS = 8, 128, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6, help="that the student keeps")
    parser.add_argument("--k", type=int, default=64, help="tokens that the cache keeps")


def steps(kind: str, args: argparse.Namespace) -> Mapping[str, float]:
    from treadle.core.pipeline import Pipeline, Workspace
    from treadle.data.batch import Piece, assemble
    from treadle.data.source import Env, Work
    from treadle.distillation.cached import Cached
    from treadle.distillation.students import Thinned
    from treadle.distillation.taught import Live, Teacher
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.source import Pretrained
    from treadle.objectives.distil import Distil
    from treadle.objectives.soft_labels import SoftLabels
    from treadle.optim.adamw import AdamW
    from treadle.tokenizers.load import tokenizer_of
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does
    source = Pretrained(name="smollm2-135m-instruct")
    layers = tuple(round(29 * i / (args.layers - 1)) for i in range(args.layers))
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), Path(folder), Pipeline(name="race", steps=()))
        opened = Thinned(model=source, layers=layers).open(workspace)
        model = opened.model
        env = Env(
            model=model, tokenizer=tokenizer_of(opened), scratch=Path(folder), workspace=workspace
        )
        lesson = Live() if kind == "live" else Cached(k=args.k)
        pupil = lesson.open(Teacher(source, env), env)
        rows = [[(97 * i + 131 * j) % 49000 for i in range(WIDTH)] for j in range(ROWS)]
        batch = assemble([Piece(row, [True] * WIDTH) for row in rows])
        plan = SingleProcess()
        world, precision = plan.setup("cpu"), FP32()
        optimizer = AdamW(lr=1e-4).build(list(model.named_parameters()))
        clock, objective = race.Clock(warmup=2), Distil(terms=(SoftLabels(),))
        for step in range(STEPS):
            with clock.lap():
                work = Work((pupil(batch, step),))
                summed_gradients(model, objective, work, world, plan, precision, precision.scaler())
                optimizer.step()
                optimizer.zero_grad()
    return {"steps/s": 1 / clock.seconds, "tok/s": ROWS * WIDTH / clock.seconds}


if __name__ == "__main__":
    race.main(
        {
            "treadle": lambda args: steps("cached", args),
            "live teacher": lambda args: steps("live", args),
        },
        name=lambda args: f"distil_{args.layers}_layers_k{args.k}",
        unit="steps a second",
        add_arguments=add_arguments,
    )
