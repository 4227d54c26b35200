"""Pretraining a 15M-parameter Llama on full windows: treadle beside the Hugging Face Trainer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping

import race

VOCAB, DIM, LAYERS, HEADS, HIDDEN, CONTEXT = 8192, 320, 10, 5, 864, 512
STEPS, BATCH = 6, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")


def rows() -> list[list[int]]:
    return [[(7 * i + 13 * j) % VOCAB for i in range(CONTEXT)] for j in range(BATCH * STEPS)]


def figures(seconds: float, parameters: int) -> Mapping[str, float]:
    """Useful work: 6 FLOPs a parameter and token; the tied embedding counts once, as the head."""
    speed = BATCH * CONTEXT / seconds
    return {"tok/s": speed, "GFLOP/s": 6 * parameters * speed / 1e9, "parameters": parameters}


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    from treadle.data.batch import Piece, assemble
    from treadle.data.source import Work
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.decoder import Decoder
    from treadle.nn.block import Block
    from treadle.nn.ffn.ffn import GatedMLP
    from treadle.nn.mixers.attention import Attention
    from treadle.objectives.causal import CausalLM
    from treadle.optim.adamw import AdamW
    from treadle.optim.clipping import NormClip
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import BF16, FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does
    block = Block(mixer=Attention(heads=HEADS), ffn=GatedMLP(hidden=HIDDEN))
    model = Decoder(vocab=VOCAB, dim=DIM, context=CONTEXT, blocks=(block,) * LAYERS).build()
    plan = SingleProcess()
    world = plan.setup()
    precision = FP32() if args.precision == "fp32" else BF16()
    named = list(model.named_parameters())
    optimizer = AdamW(lr=1e-3).build(named)
    clipper, scaler = NormClip().build(), precision.scaler()
    clock = race.Clock()
    pieces = [Piece(row, [True] * len(row)) for row in rows()]
    for i in range(0, len(pieces), BATCH):
        with clock.lap():
            work = Work((assemble(pieces[i : i + BATCH]),))
            summed_gradients(model, CausalLM(), work, world, plan, precision, scaler)
            clipper([p for _, p in named])
            optimizer.step()
            optimizer.zero_grad()
    return figures(clock.seconds, sum(p.numel() for p in model.parameters()))


def hf_trainer(args: argparse.Namespace) -> Mapping[str, float]:
    from datasets import Dataset
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    clock = race.Clock()

    class Laps(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.context = clock.lap()
            self.context.__enter__()

        def on_step_end(self, *_, **__) -> None:
            self.context.__exit__(None, None, None)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=STEPS,
                learning_rate=1e-3,
                bf16=args.precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows(), "labels": rows()}),
            callbacks=[Laps()],
        ).train()
    return figures(clock.seconds, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "hf trainer": hf_trainer},
        name=lambda args: f"pretrain_{args.precision}",
        unit="tokens a second",
        add_arguments=add_arguments,
    )
