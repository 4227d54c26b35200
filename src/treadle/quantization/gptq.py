r"""GPTQ: round a matrix column by column, and let later columns make good each rounding error.

For a linear layer y = W x with inputs X the error is tr(dW H dW^T), H = X X^T. With U the upper
Cholesky factor of H^-1, U^T U = H^-1, the columns j are rounded one after another:

    q_j = round(w_j)        e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk  for k > j

Blocks of the model are worked through in order, each on the outputs of the rounded ones before.

Plain rounding has a trap that this avoids: a model that came out of a 4-bit file lies on that
file's grid, and what little it learned since is rounded away again, weight by weight. Here the
errors add up along a row until a code changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.progress import Progress
from treadle.data.source import Env, Source
from treadle.kernels import round_quants
from treadle.kernels.blocks import BlockFormat, block_format, dequantise, quantise
from treadle.kernels.scales import inverse
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context
from treadle.quantization.rounding import FileRounding

CARD = Card(
    id="q.gptq",
    paper="Frantar et al. 2023, GPTQ, arXiv:2210.17323",
    summary="Rounding with error feedback on calibration data, columns by activation order.",
    recipe="treadle run quickstart",
    oracle="tests/quantization/test_quantization_gptq.py::test_follows_optimal_brain_surgeon",
)
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}
LAZY = 128
"""Columns after which the errors are carried to all columns behind them, in one product."""


class GPTQ(FileRounding):
    """Rounds the linear layers of the blocks to Q4_0, Q4_1, Q5_0 or Q5_1."""

    source: Source
    """Calibration data: what the model will be used for."""
    tokens: int = Field(8192, ge=64)
    """Calibration tokens, at least."""
    damp: float = Field(0.01, gt=0)
    """Added to the diagonal of H, as a share of its mean."""

    @torch.no_grad()
    def __call__(
        self, model: DecoderModel, env: Env, format: str, progress: Progress
    ) -> dict[str, Tensor]:
        if format not in BITS:
            raise ConfigError(f"GPTQ rounds to {', '.join(BITS)}, not to {format}")
        chosen = block_format(format)
        runs = calibration(self, model, env)
        packed: dict[str, Tensor] = {}
        with progress.task("GPTQ", len(model.blocks)) as task:
            for number, block in enumerate(model.blocks):
                prefix = f"blocks.{number}"
                linears = {
                    f"{prefix}.{name}": part
                    for name, part in block.named_modules()
                    if isinstance(part, nn.Linear) and part.in_features % chosen.block_size == 0
                }
                for name, h in hessians(block, linears, runs, env).items():
                    weight = linears[name].weight
                    rounded = gptq(weight.detach().float(), h, chosen, damp=self.damp)
                    weight.data.copy_(dequantise(rounded, chosen))
                    packed[f"{name}.weight"] = rounded
                for run in runs:
                    with env.autocast():
                        run.x = block(run.x, run.context)
                task.update(number + 1)
        return packed


@dataclass
class Calibration:
    """A batch on its way through the model."""

    x: Float[Tensor, "N D"]
    context: Context


def calibration(config: GPTQ, model: DecoderModel, env: Env) -> list[Calibration]:
    """What the first block reads, for at least `config.tokens` tokens."""
    runs: list[Calibration] = []
    stream = config.source.open(env)
    while sum(len(run.x) for run in runs) < config.tokens:
        for batch in next(stream).batches:
            batch = batch.to(env.device)
            context = batch.context()
            runs.append(Calibration(model.embed(batch.tokens, context), context))
    return runs


def hessians(
    block: nn.Module, linears: Mapping[str, nn.Linear], runs: list[Calibration], env: Env
) -> dict[str, Float[Tensor, "in in"]]:
    """H = X X^T of each linear layer over all runs, in float32."""
    inputs: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(partial(_keep, inputs, name))
        for name, linear in linears.items()
    ]
    try:
        for run in runs:
            with env.autocast():
                block(run.x, run.context)
            products: dict[int, Tensor] = {}  # q, k and v read the same tensor
            for name, x in inputs.items():
                if id(x) not in products:
                    rows = x.float()
                    products[id(x)] = rows.T @ rows
                h = products[id(x)]
                total[name] = total[name] + h if name in total else h
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _keep(
    inputs: dict[str, Tensor], name: str, module: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    inputs[name] = arguments[0]


def gptq(
    weight: Float[Tensor, "out in"], h: Float[Tensor, "in in"], format: BlockFormat, *, damp: float
) -> UInt8[Tensor, "out bytes"]:
    """The weight's blocks; scales are those of plain rounding, codes follow the errors.

    Raises:
        TreadleError: H is not finite.
    """
    bits = BITS[format.name]
    nearest = quantise(weight, format).view(-1, format.block_bytes)
    order = h.diagonal().argsort(descending=True)
    step, low = (
        part.view(len(weight), -1).repeat_interleave(format.block_size, 1).T[order].contiguous()
        for part in round_quants.grid(nearest, bits)
    )
    per_step = inverse(step)
    u = upper_factor(h[order][:, order], damp).to(weight.dtype)
    w = weight.T[order].contiguous()  # a column of the matrix is a row here
    codes = torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, len(w), LAZY):
        stop = min(start + LAZY, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            q = ((w[j] - low[j]) * per_step[j]).round_().clamp_(0, (1 << bits) - 1)
            e = (w[j] - (q * step[j] + low[j])) / u[j, j]
            w[j + 1 : stop] -= torch.outer(u[j, j + 1 : stop], e)
            codes[j], errors[j - start] = q.to(torch.uint8), e
        w[stop:] -= u[start:stop, stop:].T @ errors
    back = torch.empty_like(codes)
    back[order] = codes
    blocks = round_quants.recode(nearest, back.T.reshape(-1, format.block_size), bits)
    return blocks.view(len(weight), -1)


def upper_factor(h: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """U with U^T U = (H + damp mean(diag H) I)^-1, in float64."""
    h = h.double()
    mean = float(h.diagonal().mean())
    if not math.isfinite(mean):
        raise TreadleError("GPTQ: activations are not finite; look for a diverged run")
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    damped = h + max(damp * mean, torch.finfo(torch.float32).tiny) * eye
    factor: Tensor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
    )
    return factor
