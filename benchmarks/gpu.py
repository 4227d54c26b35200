"""Every path that treadle has for a GPU: checked against the processor, then timed.

    python benchmarks/gpu.py                      all of it, on `cuda`, with SmolLM2-135M
    python benchmarks/gpu.py --only kernels       kernels, decoding or training alone
    python benchmarks/gpu.py --model tiny         a random model, where nothing can be fetched
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --model tiny --quick
                                                  the script itself, where there is no GPU

Checks compare with fp32 on the processor. One that fails makes the script fail, after all others
have run. Races are beside vLLM, PEFT and Unsloth, where these are installed. Figures go to
`benchmarks/results/gpu.json`, with the device's name.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import race
import torch
from common import model_folder
from torch import Tensor

from treadle.data.batch import Piece, assemble
from treadle.data.source import Work
from treadle.inference.decode import Compiled, Decode, Eager, Graphs
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.page_attention import PageAttention, TorchPages, TritonPages
from treadle.inference.paged_memory import PagesOnly
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.kernels.attention import AttentionRule
from treadle.kernels.paged_attention import Where, paged_attention_reference
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.llama import tiny_llama
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.quantization.float8 import DynamicFloat8, Float8, Float8Weight
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.train.faster import CompileLayers, TritonKernels
from treadle.train.parallel.plan import SingleProcess, World
from treadle.train.precision import BF16, FP32, Precision
from treadle.train.step import summed_gradients


@dataclass
class Ledger:
    """What was found."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, error: float, limit: float) -> None:
        good = error <= limit
        self.checks.append({"check": name, "error": error, "limit": limit, "passed": good})
        print(f"{'ok    ' if good else 'FAILED'} {name}: {error:.3g} (limit {limit:.3g})")

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """A path that falls is a failed check, and no reason to skip the others."""
        try:
            work()
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.checks.append({"check": name, "fell": said, "passed": False})
            print(f"FAILED {name}: {said}")

    def time(self, name: str, **figures: float) -> None:
        self.times.append({"path": name, **figures})
        print(f"       {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of `work`, the device waited for."""
    laps = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[2:])


def far(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).abs().max() / exact.abs().max())


# Kernels


def kernels(args: argparse.Namespace, ledger: Ledger) -> None:
    device = torch.device(args.device)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if dtype is torch.bfloat16 and device.type == "cpu":
            continue  # Triton's interpreter multiplies none
        label = str(dtype).removeprefix("torch.")
        ledger.attempt(
            f"paged attention {label}", lambda d=dtype, x=limit: paged(args, ledger, d, x)
        )
        ledger.attempt(f"norm {label}", lambda d=dtype, x=limit: norm(args, ledger, d, x))
        ledger.attempt(f"gate {label}", lambda d=dtype, x=limit: gate(args, ledger, d, x))
    ledger.attempt("fp8 product", lambda: float8(args, ledger))


def paged(args: argparse.Namespace, ledger: Ledger, dtype: torch.dtype, limit: float) -> None:
    from treadle.kernels.gpu.paged_attention import paged_attention

    rows, length = (2, 70) if args.quick else (32, 2000)
    rules = {
        "plain": AttentionRule(scale=0.125),
        "window": AttentionRule(scale=0.125, window=33, sinks=4),
        "softcap": AttentionRule(scale=0.125, softcap=20.0),
        "alibi": AttentionRule(scale=0.125, slopes=tuple(2.0**-i for i in range(9))),
    }
    page, pages = 16, -(-length // 16)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(rows * pages * page, 3, 64, generator=generator) for _ in range(2))
    q = torch.randn(rows, 9, 64, generator=generator)
    tables = torch.randperm(rows * pages, generator=generator).view(rows, pages)
    where = Where(page, tables, torch.randint(length // 2, length, (rows,), generator=generator))
    placed = Where(page, tables.to(args.device), where.positions.to(args.device))
    moved = [t.to(args.device, dtype) for t in (q, keys, values)]
    for name, rule in rules.items():
        exact = paged_attention_reference(q, keys, values, where, rule)
        label = f"paged attention {name} {str(dtype).removeprefix('torch.')}"
        ledger.check(label, far(paged_attention(*moved, placed, rule), exact), limit)
    for label, run in (
        ("triton", lambda: paged_attention(*moved, placed, rules["plain"])),
        ("gathered", lambda: paged_attention_reference(*moved, placed, rules["plain"])),
    ):
        spent = seconds(run, torch.device(args.device), args.rounds)
        ledger.time(f"paged attention, {rows} x {length}, {label}, {dtype}", ms=1e3 * spent)


def norm(args: argparse.Namespace, ledger: Ledger, dtype: torch.dtype, limit: float) -> None:
    from treadle.kernels.gpu.rms_norm import rms_norm as fast
    from treadle.kernels.rms_norm import rms_norm, rms_norm_reference

    rows, dim = (6, 64) if args.quick else (8192, 2048)
    elementwise(
        args,
        ledger,
        "norm",
        dtype,
        limit,
        (torch.randn(rows, dim), torch.randn(dim)),
        tuple(lambda x, g, f=f: f(x, g, 1e-5) for f in (rms_norm_reference, rms_norm, fast)),
    )


def gate(args: argparse.Namespace, ledger: Ledger, dtype: torch.dtype, limit: float) -> None:
    from treadle.kernels.gated import gated, gated_reference
    from treadle.kernels.gpu.gated import gated as fast

    shape = (6, 64) if args.quick else (8192, 4096)
    elementwise(
        args,
        ledger,
        "gate",
        dtype,
        limit,
        (torch.randn(shape), torch.randn(shape)),
        tuple(lambda x, u, f=f: f(x, u, "silu") for f in (gated_reference, gated, fast)),
    )


def elementwise(
    args: argparse.Namespace,
    ledger: Ledger,
    name: str,
    dtype: torch.dtype,
    limit: float,
    inputs: tuple[Tensor, ...],
    functions: tuple[Callable[..., Tensor], ...],
) -> None:
    """Definition on the processor, torch and Triton on the device: outputs, gradients, times."""
    reference, plain, fast = functions
    dy = torch.randn_like(inputs[0])

    def both(f: Callable[..., Tensor], device: str, kind: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(device, kind).requires_grad_() for t in inputs]
        y = f(*given)
        return [y, *torch.autograd.grad(y, given, dy.to(device, kind))]

    for i, (found, exact) in enumerate(
        zip(both(fast, args.device, dtype), both(reference, "cpu", torch.float32), strict=True)
    ):
        label = f"{name} {'output' if i == 0 else f'gradient {i}'}"
        ledger.check(f"{label} {str(dtype).removeprefix('torch.')}", far(found, exact), limit)
    for label, f in (("torch", plain), ("triton", fast)):
        spent = seconds(
            lambda g=f: both(g, args.device, dtype), torch.device(args.device), args.rounds
        )
        ledger.time(f"{name} forward and backward, {label}, {dtype}", ms=1e3 * spent)


def float8(args: argparse.Namespace, ledger: Ledger) -> None:
    rows, dim = (4, 64) if args.quick else (4096, 4096)
    weight = Float8Weight(torch.randn(dim, dim)).to(args.device)
    x = torch.randn(rows, dim, device=args.device, dtype=torch.bfloat16)
    kernel = DynamicFloat8()
    kernel.check(weight)
    exact = x.float() @ weight.dense(torch.float32).T
    # Rounding errors of 2^-4 at most, independent of each other: far less in a sum.
    ledger.check("fp8 product", far(kernel.forward(x, weight), exact), 2**-4)
    dense = weight.dense(torch.bfloat16)
    device = torch.device(args.device)
    for label, run in (
        ("fp8", lambda: kernel.forward(x, weight)),
        ("bf16", lambda: x @ dense.T),
    ):
        spent = seconds(run, device, args.rounds)
        ledger.time(
            f"product {rows} x {dim} x {dim}, {label}", tflops=2e-12 * rows * dim**2 / spent
        )


# Decoding


def opened(args: argparse.Namespace) -> tuple[DecoderModel, Tokenizer]:
    if args.model == "tiny":
        torch.manual_seed(0)
        config = tiny_llama(512, dim=64, layers=2, kv_heads=2, context=256)
        return config.build().eval(), byte_tokenizer()
    folder = model_folder()
    return load_model(folder, dtype=torch.float32).model.eval(), Tokenizer.load(folder)


def byte_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    from treadle.tokenizers.tokenizer import SpecialTokens

    backend = Backend(models.BPE({chr(33 + i): i for i in range(512)}, []))
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special=SpecialTokens(eos="<end>"))


def ways(args: argparse.Namespace) -> Iterator[tuple[str, Decode, PageAttention]]:
    for attention in (TorchPages(), TritonPages()):
        yield f"eager, {type(attention).__name__}", Eager(), attention
        yield f"compiled, {type(attention).__name__}", Compiled(), attention
        if args.device != "cpu":
            for over in (Eager(), Compiled()):
                label = f"graphs over {type(over).__name__}, {type(attention).__name__}"
                yield label, Graphs(over=over), attention


def requests(batch: int, prompt: int, tokens: int, vocab: int) -> list[Request]:
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    return [
        Request(tuple((7 * i + 13 * j) % (vocab - 10) for i in range(prompt)), sampling)
        for j in range(batch)
    ]


def decoding(args: argparse.Namespace, ledger: Ledger) -> None:
    model, tokenizer = opened(args)
    tokenizer.__dict__["stop_ids"] = frozenset()  # every path writes all that is asked for
    prompt, tokens = (20, 6) if args.quick else (128, 128)
    given = requests(4, prompt, tokens, model.config.vocab)
    exact = Engine(model, tokenizer, EngineConfig(slots=4)).generate(given)
    kept = {
        "float32": (1e-3, lambda m: m),
        "bfloat16": (0.5, lambda m: m.to(torch.bfloat16)),
        "float8": (1.0, lambda m: Float8()(m.to(torch.bfloat16))),
        "float8 products": (1.0, lambda m: Float8(kernel=DynamicFloat8())(m.to(torch.bfloat16))),
    }
    for numbers, (limit, change) in kept.items():
        placed = change(copy.deepcopy(model).requires_grad_(False).to(args.device))
        for label, decode, attention in ways(args):
            name = f"{numbers}, {label}"

            def run(
                name: str = name,
                decode: Decode = decode,
                attention: PageAttention = attention,
                placed: DecoderModel = placed,
                limit: float = limit,
            ) -> None:
                config = EngineConfig(
                    slots=32,
                    decode=decode,
                    cache=PagesOnly(attention=attention),
                    cache_tokens=2**16,
                )
                engine = Engine(placed, tokenizer, config)
                ledger.check(name, difference(exact, engine.generate(given)), limit)
                for batch in (1,) if args.quick else (1, 8, 32):
                    load = requests(batch, prompt, tokens, model.config.vocab)
                    read = requests(batch, prompt, 1, model.config.vocab)
                    whole, first = (
                        seconds(
                            lambda r=r: engine.generate(r), torch.device(args.device), args.rounds
                        )
                        for r in (load, read)
                    )
                    rate = batch * (tokens - 1) / max(whole - first, 1e-9)
                    ledger.time(f"{name}, batch {batch}", decode=rate)

            ledger.attempt(name, run)
    if find_spec("vllm") is not None and args.model != "tiny":
        ledger.attempt("vllm", lambda: vllm(ledger, given, tokens))


def difference(exact: list[Any], found: list[Any]) -> float:
    """Largest difference of log-probabilities while the texts are equal; where they part, the
    tokens' own, as both were the likeliest in their eyes."""
    worst = 0.0
    for (one,), (other,) in zip(exact, found, strict=True):
        for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
            worst = max(worst, abs(p - q))
            if a != b:
                break
    return worst


def vllm(ledger: Ledger, given: list[Request], tokens: int) -> None:
    from vllm import LLM, SamplingParams

    peer = LLM(str(model_folder()), dtype="bfloat16", gpu_memory_utilization=0.3)
    for batch in (1, 8, 32):
        load = [{"prompt_token_ids": list(given[i % len(given)].prompt)} for i in range(batch)]

        def write(count: int, load: list[Any] = load) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            peer.generate(load, params, use_tqdm=False)

        device = torch.device("cuda")
        whole, first = (seconds(lambda n=n: write(n), device, 3) for n in (tokens, 1))
        rate = batch * (tokens - 1) / max(whole - first, 1e-9)
        ledger.time(f"vLLM, bfloat16, batch {batch}", decode=rate)


# Training


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


SECTIONS = {"kernels": kernels, "decoding": decoding, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes: is all there?")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; to try the script itself see --help")
    ledger = Ledger()
    for section in args.only:
        print(f"{section}:")
        SECTIONS[section](args, ledger)
    name = "processor" if args.device == "cpu" else torch.cuda.get_device_name()
    record = {
        "benchmark": "gpu",
        "settings": vars(args),
        "device": name,
        "versions": {"torch": torch.__version__},
        "checks": ledger.checks,
        "times": ledger.times,
    }
    if args.device != "cpu":
        path = race.RESULTS / "gpu.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}")
    failed = [row["check"] for row in ledger.checks if not row["passed"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(ledger.checks)} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
