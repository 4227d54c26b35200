"""Training on a GPU: LoRA's gradients against the processor's, then steps timed beside PEFT and
Unsloth."""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from typing import Any

import torch
from common import model_folder
from gpu_ledger import Ledger, far, opened, seconds
from torch import Tensor

from treadle.data.batch import Piece, assemble
from treadle.data.source import Work
from treadle.models.decoder import DecoderModel
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.train.faster import CompileLayers, TritonKernels
from treadle.train.parallel.plan import SingleProcess, World
from treadle.train.precision import BF16, FP32, Precision
from treadle.train.step import summed_gradients


def training(args: argparse.Namespace, ledger: Ledger) -> None:
    """Loss and gradients of LoRA steps against fp32 on the processor, then tokens a second."""
    model, _ = opened(args)
    texts, length = (2, 24) if args.quick else (8, 512)
    vocab = model.config.vocab
    rows = [[(7 * i + 13 * j) % (vocab - 10) for i in range(length)] for j in range(texts)]
    work = Work((assemble([Piece(row, [True] * length) for row in rows]),))
    small = Work((assemble([Piece(row[:24], [True] * 24) for row in rows[:2]]),))
    torch.manual_seed(0)
    adapted = LoRA(rank=16)(model).train()
    cpu = World(rank=0, size=1, device=torch.device("cpu"))
    gpu = World(rank=0, size=1, device=torch.device(args.device))
    exact = gradients(copy.deepcopy(adapted), small, cpu, FP32())
    for label, precision, transforms, limit in (
        ("fp32", FP32(), (), 1e-3),
        ("bf16", BF16(), (), 0.1),
        ("bf16, Triton", BF16(), (TritonKernels(),), 0.1),
        ("bf16, compiled", BF16(), (CompileLayers(),), 0.1),
        ("bf16, Triton, compiled", BF16(), (TritonKernels(), CompileLayers()), 0.1),
    ):

        def run(
            label: str = label,
            precision: Precision = precision,
            transforms: tuple[Any, ...] = transforms,
            limit: float = limit,
        ) -> None:
            placed = copy.deepcopy(adapted)
            for transform in transforms:
                placed = transform(placed)
            placed.to(gpu.device)
            precision.prepare(placed)
            found = gradients(placed, small, gpu, precision)
            ledger.check(f"LoRA gradients, {label}", far(found, exact), limit)
            optimizer = AdamW(lr=1e-4).build(
                [(n, p) for n, p in placed.named_parameters() if p.requires_grad]
            )

            def step() -> None:
                summed_gradients(
                    placed, CausalLM(), work, gpu, SingleProcess(), precision, precision.scaler()
                )
                optimizer.step()
                optimizer.zero_grad()

            if gpu.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spent = seconds(step, gpu.device, args.rounds)
            memory = torch.cuda.max_memory_allocated() if gpu.device.type == "cuda" else 0
            ledger.time(
                f"LoRA step, {texts} x {length}, {label}",
                tokens_a_second=texts * length / spent,
                peak_gib=memory / 2**30,
            )

        ledger.attempt(f"LoRA, {label}", run)
    if args.model == "tiny" or gpu.device.type != "cuda":
        return
    for name, build in (("peft", peft_model), ("unsloth", unsloth_model)):
        if find_spec(name) is not None:
            ledger.attempt(name, lambda n=name, b=build: peer(ledger, n, b(), rows, args.rounds))


def gradients(model: DecoderModel, work: Work, world: World, precision: Precision) -> Tensor:
    """Of all that is trained, end to end."""
    summed_gradients(model, CausalLM(), work, world, SingleProcess(), precision, precision.scaler())
    found = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).cuda()
    return get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS))


def unsloth_model() -> Any:
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(
        str(model_folder()), max_seq_length=512, dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(base, r=16, target_modules=TARGETS)


def peer(ledger: Ledger, name: str, model: Any, rows: list[list[int]], rounds: int) -> None:
    ids = torch.tensor(rows, device="cuda")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    spent = seconds(step, torch.device("cuda"), rounds)
    ledger.time(
        f"LoRA step, {len(rows)} x {len(rows[0])}, {name}",
        tokens_a_second=ids.numel() / spent,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
    )
