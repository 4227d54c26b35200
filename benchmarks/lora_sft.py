"""A LoRA fine-tuning step of SmolLM2-135M: treadle beside TRL's SFTTrainer with PEFT.

`--data full` trains on 2 x 512 tokens without padding; `--data real` on GSM8K conversations of
unequal length, 8 a step, the loss on the answers. Same rank, targets, optimiser and precision.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping

import race
from common import gsm8k, model_folder

STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=["full", "real"], default="full")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="let the peer recompute")


def rows() -> list[list[int]]:
    return [[(7 * i + 13 * j) % 40_000 + 500 for i in range(512)] for j in range(2 * STEPS)]


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    import torch

    from treadle.data.batch import Piece, assemble
    from treadle.data.source import Work
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.hub.load import load_model
    from treadle.objectives.causal import CausalLM
    from treadle.optim.adamw import AdamW
    from treadle.optim.clipping import NormClip
    from treadle.peft.lora import LoRA
    from treadle.tokenizers.chat import encode_chat
    from treadle.tokenizers.tokenizer import Tokenizer
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import BF16, FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does
    model = LoRA(rank=16)(load_model(model_folder(), dtype=torch.float32).model)
    plan = SingleProcess()
    world = plan.setup()
    precision = FP32() if args.precision == "fp32" else BF16()
    precision.prepare(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(lr=1e-4).build(named)
    clipper, scaler = NormClip().build(), precision.scaler()
    if args.data == "full":
        pieces = [Piece(row, [True] * len(row)) for row in rows()]
        groups = [pieces[i : i + 2] for i in range(0, len(pieces), 2)]
    else:
        tokenizer = Tokenizer.load(model_folder())
        chats = [encode_chat(tokenizer, chat) for chat in gsm8k(8 * STEPS)]
        pieces = [Piece(c.ids[:512], c.mask[:512]) for c in chats]
        groups = [pieces[i : i + 8] for i in range(0, len(pieces), 8)]
    clock = race.Clock()
    model.train()
    tokens = 0
    for group in groups:
        with clock.lap():
            work = Work((assemble(group),))
            summed_gradients(model, CausalLM(), work, world, plan, precision, scaler)
            clipper([p for _, p in named])
            optimizer.step()
            optimizer.zero_grad()
        tokens += sum(len(p.tokens) for p in group)
    return {"tok/s": tokens / len(groups) / clock.seconds, "s/step": clock.seconds}


def trl_peft(args: argparse.Namespace) -> Mapping[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = race.Clock()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    if args.data == "full":
        data = Dataset.from_dict({"input_ids": rows()})
        size = 2
    else:
        data = Dataset.from_list(
            [{"prompt": chat[:1], "completion": chat[1:]} for chat in gsm8k(8 * STEPS)]
        )
        size = 8

    class Laps(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.context = clock.lap()
            self.context.__enter__()

        def on_step_end(self, *_, **__) -> None:
            self.context.__exit__(None, None, None)

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=size,
                max_length=512,
                max_steps=STEPS,
                learning_rate=1e-4,
                gradient_checkpointing=args.checkpointing,
                bf16=args.precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
                shuffle_dataset=False,
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=[
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                ],
                task_type="CAUSAL_LM",
            ),
            callbacks=[Laps()],
        )
        trainer.train()
    if args.data == "full":
        tokens = 2 * 512.0
    else:
        texts = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in gsm8k(8 * STEPS)]
        tokens = sum(min(512, len(t)) for t in texts) / STEPS
    return {"tok/s": tokens / clock.seconds, "s/step": clock.seconds}


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "trl+peft": trl_peft},
        name=lambda args: f"lora_sft_{args.data}_{args.precision}",
        unit="tokens a second that are not padding",
        add_arguments=add_arguments,
    )
