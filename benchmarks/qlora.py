"""A QLoRA step of SmolLM2-135M (NF4 base, 8-bit optimiser states) beside a LoRA step.

2 x 512 tokens a step without padding, rank 16, same precision. Wanted: at most 1.3 times the time
at less than half the memory of the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import race

ROWS, WIDTH, STEPS = 2, 512, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")


def steps(args: argparse.Namespace, *, packed: bool) -> Mapping[str, float]:
    import torch

    from treadle.data.batch import Piece, assemble
    from treadle.data.source import Work
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.hub.load import load_model
    from treadle.models.hub.pull import pull
    from treadle.objectives.causal import CausalLM
    from treadle.optim.adamw import AdamW
    from treadle.optim.adamw8bit import AdamW8bit
    from treadle.peft.lora import LoRA
    from treadle.quantization.nf4 import NF4
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import BF16, FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does
    model = load_model(pull("smollm2-135m-instruct").path, dtype=torch.float32).model
    for transform in (NF4(), LoRA(rank=16)) if packed else (LoRA(rank=16),):
        model = transform(model)
    precision = FP32() if args.precision == "fp32" else BF16()
    precision.prepare(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = (AdamW8bit if packed else AdamW)(lr=1e-4).build(named)
    plan = SingleProcess()
    world, clock = plan.setup("cpu"), race.Clock()
    rows = [[(7 * i + 13 * j) % 40_000 + 500 for i in range(WIDTH)] for j in range(ROWS)]
    work = Work((assemble([Piece(row, [True] * WIDTH) for row in rows]),))
    model.train()
    for _ in range(STEPS):
        with clock.lap():
            summed_gradients(model, CausalLM(), work, world, plan, precision, precision.scaler())
            optimizer.step()
            optimizer.zero_grad()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = sum(t.nbytes for t in (*frozen, *model.buffers()))
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "s/step": clock.seconds,
        "weights MiB": weights / 2**20,
        "optimiser MiB": states / 2**20,
    }


if __name__ == "__main__":
    race.main(
        {
            "treadle": lambda args: steps(args, packed=True),
            "LoRA": lambda args: steps(args, packed=False),
        },
        name=lambda args: f"qlora_{args.precision}",
        unit="seconds a step",
        add_arguments=add_arguments,
    )
