"""A DPO step of SmolLM2-135M with LoRA: treadle beside TRL's DPOTrainer.

    python benchmarks/dpo.py --rounds 1

Pairs from GSM8K, twice: in `equal` the rejected answer is the worked one with letters changed; in
`unequal` it is the bare result. Both compute the reference once before training, and its time is
counted for neither. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import race
from common import gsm8k, model_folder

KINDS = ("equal", "unequal")
Pair = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=8, help="in an optimiser step")
    parser.add_argument("--steps", type=int, default=3, help="of each kind; the first is not timed")
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--model", help="a Hugging Face folder [SmolLM2-135M-Instruct]")


def pairs(args: argparse.Namespace, kind: str) -> list[Pair]:
    rows = []
    for question, answer in gsm8k(args.pairs * args.steps):
        chosen = answer["content"]
        rejected = chosen.replace("a", "e") if kind == "equal" else chosen.rpartition("#### ")[2]
        rows.append({"prompt": question["content"], "chosen": chosen, "rejected": rejected})
    return rows


def folder_of(args: argparse.Namespace) -> Path:
    return Path(args.model) if args.model else model_folder()


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    return {f"s/step {kind}": treadle_seconds(args, pairs(args, kind)) for kind in KINDS}


def trl_dpo(args: argparse.Namespace) -> Mapping[str, float]:
    return {f"s/step {kind}": trl_seconds(args, pairs(args, kind)) for kind in KINDS}


def treadle_seconds(args: argparse.Namespace, rows: list[Pair]) -> float:
    import torch

    from treadle.alignment.preferences import Pairs, Preferences
    from treadle.data.records import Preference, assistant, user
    from treadle.data.source import Env
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.hub.load import load_model
    from treadle.objectives.dpo import DPO
    from treadle.optim.adamw import AdamW
    from treadle.optim.clipping import NormClip
    from treadle.peft.lora import LoRA
    from treadle.tokenizers.tokenizer import Tokenizer
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does

    class Rows(Pairs):
        def pair(self, index: int) -> Preference:
            row = rows[index]
            answers = ((assistant(row[k]),) for k in ("chosen", "rejected"))
            return Preference((user(row["prompt"]),), *answers)

        def count(self) -> int:
            return len(rows)

    model = LoRA(rank=16)(load_model(folder_of(args), dtype=torch.float32).model)
    plan, precision = SingleProcess(), FP32()
    world = plan.setup()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(lr=1e-5).build(named)
    clipper, scaler = NormClip().build(), precision.scaler()
    source = Preferences(pairs=Rows(), per_step=args.pairs, longest=args.longest)
    clock = race.Clock()
    with tempfile.TemporaryDirectory() as folder:
        env = Env(model=model, tokenizer=Tokenizer.load(folder_of(args)), scratch=Path(folder))
        stream = source.open(env)
        for _ in range(args.steps):
            with clock.lap():
                work = next(stream)
                summed_gradients(model, DPO(), work, world, plan, precision, scaler)
                clipper([p for _, p in named])
                optimizer.step()
                optimizer.zero_grad()
    return clock.seconds


def trl_seconds(args: argparse.Namespace, rows: list[Pair]) -> float:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = race.Clock()

    class Laps(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            clock.laps.append(time.perf_counter() - self.start)

    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")},
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder_of(args), dtype=torch.float32),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.pairs,
                max_length=args.longest,
                max_steps=args.steps,
                learning_rate=1e-5,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(chats),
            processing_class=AutoTokenizer.from_pretrained(folder_of(args)),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Laps()],
        ).train()
    return clock.seconds


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "trl": trl_dpo},
        name=lambda args: f"dpo_{args.pairs}",
        unit="seconds a step",
        add_arguments=add_arguments,
    )
