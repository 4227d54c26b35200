"""A GRPO step of SmolLM2-135M with LoRA: treadle beside TRL's GRPOTrainer.

8 prompts x 8 completions x 64 tokens: generate, score, one update. The reward counts a letter, so
that groups have a signal; completions are cut at 64 tokens for both. treadle samples from weights
rounded to 8 bits unless told otherwise; how far their log-probabilities are from those of the
update is reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import race
from common import gsm8k, model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--batch", type=int, default=2048, help="tokens in a micro-batch of treadle"
    )
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--sampler", choices=["own", "merged", "native"], default="native")


def reward(text: str) -> float:
    return text.count("e") / (1 + len(text))


def treadle(args: argparse.Namespace) -> Mapping[str, float]:
    from functools import partial

    import torch

    from treadle.alignment.rollouts import Rollouts
    from treadle.alignment.samplers import MergedAdapters, NativeKernels, OwnWeights
    from treadle.data.problems import Problems
    from treadle.data.records import Problem, user
    from treadle.data.source import Env
    from treadle.inference.sampling import Sampling
    from treadle.kernels.heap import keep_tensors_apart
    from treadle.models.hub.load import load_model
    from treadle.objectives.policy import GRPO
    from treadle.optim.adamw import AdamW
    from treadle.optim.clipping import NormClip
    from treadle.peft.lora import LoRA
    from treadle.tokenizers.tokenizer import Tokenizer
    from treadle.train.parallel.plan import SingleProcess
    from treadle.train.precision import BF16, FP32
    from treadle.train.step import summed_gradients

    keep_tensors_apart()  # as `treadle run` does
    chats = gsm8k(args.prompts * args.steps)

    class Questions(Problems):
        def problem(self, index: int) -> Problem:
            return Problem((user(chats[index][0]["content"]),), "", "letter")

        def score(self, problem: Problem, completion: str) -> float:
            return reward(completion)

    model = LoRA(rank=16)(load_model(model_folder(), dtype=torch.float32).model)
    plan = SingleProcess()
    world = plan.setup()
    precision = FP32() if args.precision == "fp32" else BF16()
    precision.prepare(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(lr=1e-5).build(named)
    clipper, scaler = NormClip().build(), precision.scaler()
    tokenizer = Tokenizer.load(model_folder())
    samplers = {"own": OwnWeights(), "merged": MergedAdapters(), "native": NativeKernels()}
    source = Rollouts(
        sampler=samplers[args.sampler],
        problems=Questions(),
        prompts=args.prompts,
        completions=args.completions,
        sampling=Sampling(max_tokens=args.tokens),
        tokens=args.batch,
    )
    with tempfile.TemporaryDirectory() as folder:
        stream = source.open(
            Env(
                model=model,
                tokenizer=tokenizer,
                scratch=Path(folder),
                autocast=partial(precision.autocast, "cpu"),
            )
        )
        step, generation, mismatch = race.Clock(), race.Clock(), 0.0
        for _ in range(args.steps):
            with step.lap():
                with generation.lap():
                    work = next(stream)
                sums = summed_gradients(model, GRPO(), work, world, plan, precision, scaler)
                clipper([p for _, p in named])
                optimizer.step()
                optimizer.zero_grad()
            mismatch = float(sums.values["metric.mismatch"] / sums.values["weight"])
    return {
        "s/step": step.seconds,
        "s generating": generation.seconds,
        "mismatch, nats a token": mismatch,
    }


def trl_grpo(args: argparse.Namespace) -> Mapping[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = race.Clock()

    class Laps(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            clock.laps.append(time.perf_counter() - self.start)

    def letter(completions, **_) -> list[float]:
        return [reward(c[0]["content"]) for c in completions]

    data = Dataset.from_list([{"prompt": chat[:1]} for chat in gsm8k(args.prompts * args.steps)])
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32),
            reward_funcs=letter,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.completions,  # all at once need over 16 GiB
                gradient_accumulation_steps=args.prompts,
                num_generations=args.completions,
                max_completion_length=args.tokens,
                max_steps=args.steps,
                learning_rate=1e-5,
                beta=0.0,
                gradient_checkpointing=False,
                bf16=args.precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model_folder()),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Laps()],
        ).train()
    return {"s/step": clock.seconds}


if __name__ == "__main__":
    race.main(
        {"treadle": treadle, "trl": trl_grpo},
        name=lambda args: (
            f"grpo_{args.prompts}x{args.completions}x{args.tokens}_{args.precision}_{args.sampler}"
        ),
        unit="seconds a step, generation and update",
        add_arguments=add_arguments,
    )
