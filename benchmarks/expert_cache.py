"""How often an expert is at hand when only the last few of each layer are kept in memory.

There is no small open mixture of experts, so one is trained here: `--minutes` of byte-level
language modelling on WikiText-2, with the load-balancing loss of Switch Transformers, lest a few
experts take all tokens. Its texts are then continued one token at a time, as a chat would be. The
figures are those of this small model; larger ones repeat their experts less or more.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import DATA
from torch import Tensor

from treadle.inference.contiguous import Contiguous
from treadle.inference.experts import CachedExperts, hit_rate, load_offloaded
from treadle.inference.runner import Batch
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel, swap
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE, MoELayer

FOLDER = Path(__file__).parent / "cache" / "mixture"
EXPERTS, TOP_K, LAYERS, WINDOW = 16, 2, 4, 256


def text(part: str) -> Tensor:
    with gzip.open(DATA / "lm" / f"wikitext2_{part}.txt.gz", "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()


def train(minutes: float) -> None:
    torch.manual_seed(0)
    dense = tiny_llama(256, dim=128, layers=LAYERS, heads=4, hidden=128, context=1024)
    mixed = swap(dense, GatedMLP, lambda f: MoE(expert=f, experts=EXPERTS, top_k=TOP_K))
    model: DecoderModel = mixed.build()
    scores: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.router.register_forward_hook(lambda m, x, y: scores.append(y))
    corpus, optimizer = text("train_part"), torch.optim.AdamW(model.parameters(), lr=2e-3)
    start, step = time.process_time(), 0
    while (spent := (time.process_time() - start) / 60) < minutes:
        at = torch.randint(len(corpus) - WINDOW - 1, (8, 1))
        rows = corpus[at + torch.arange(WINDOW + 1)]
        scores.clear()
        logits = model.logits(model(rows[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, -2), rows[:, 1:].flatten())
        balance = torch.stack([unbalance(s) for s in scores]).mean()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - spent / minutes)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(
                f"{step}: {loss / math.log(2):.3f} bits a byte, balance {balance:.3f}", flush=True
            )
    save_hf(model, FOLDER)
    (FOLDER / "training.json").write_text(
        json.dumps({"steps": step, "bits a byte": loss.item() / math.log(2), "minutes": minutes})
    )


def unbalance(scores: Tensor) -> Tensor:
    """E sum_e f_e p_e, 1 where all experts get the same (Fedus et al. 2021, equation 4)."""
    p = scores.softmax(-1)
    chosen = F.one_hot(scores.topk(TOP_K, -1).indices, EXPERTS).sum(-2) / TOP_K
    return EXPERTS * (chosen.float().mean(0) * p.mean(0)).sum()


def follow(held: int, prompt: int, tokens: int, texts: int) -> dict[str, float]:
    """Continuations of held-out text, drawn by temperature 1."""
    torch.manual_seed(0)
    loaded = load_offloaded(FOLDER, experts=held)
    runner = TorchRunner(loaded.model, pages=64, cache=Contiguous())
    corpus = text("test")
    table = list(range(-(-(prompt + tokens) // runner.page)))
    counts = [0, 0]
    for i in range(texts):
        start = corpus[i * 20_000 : i * 20_000 + prompt].tolist()
        logits = runner.run(Batch(start, [prompt], [0], [table], [1], names=[(i, 0)]))
        before = hit_rate(loaded.model)
        for at in range(prompt, prompt + tokens):
            token = int(torch.multinomial(logits[0].softmax(-1), 1))
            logits = runner.run(Batch([token], [1], [at], [table], [1], names=[(i, 0)]))
        after = hit_rate(loaded.model)
        counts = [c + a - b for c, a, b in zip(counts, after, before, strict=True)]
    caches = [m for m in loaded.model.modules() if isinstance(m, CachedExperts)]
    return {
        "hit rate": counts[0] / counts[1],
        "by chance": held / EXPERTS,
        "experts' MB": sum(c.nbytes for c in caches) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="of processor time to train")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4)
    args = parser.parse_args()
    if not (FOLDER / "training.json").exists():
        train(args.minutes)
    found = {}
    with torch.inference_mode():
        for held in (2, 3, 4, 6, 8, 12, 16):
            found[held] = follow(held, args.prompt, args.tokens, args.texts)
            print(held, found[held], flush=True)
    record = {
        "benchmark": "expert_cache",
        "model": f"{LAYERS} layers of {EXPERTS} experts, top {TOP_K}; random weights, then trained "
        "here on WikiText-2's bytes with a load-balancing loss: small, and not a released model",
        "training": json.loads((FOLDER / "training.json").read_text()),
        "settings": vars(args),
        "experts held of each layer": found,
    }
    results = Path(__file__).parent / "results" / "expert_cache.json"
    results.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
