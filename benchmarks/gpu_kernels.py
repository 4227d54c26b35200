"""Kernels on a GPU: each against its definition on the processor, then timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gpu_ledger import Ledger, far, seconds
from torch import Tensor

from treadle.kernels.attention import AttentionRule
from treadle.kernels.paged_attention import Where, paged_attention_reference
from treadle.quantization.float8 import DynamicFloat8, Float8Weight


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
