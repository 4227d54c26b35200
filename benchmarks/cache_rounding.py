"""What rounding keys to 4 bits does to the next token's distribution, on SmolLM2-135M.

Articles of Wikitext-2 are read in one pass, in which every token sees rounded keys and values; of
the last tokens the perplexity, and the divergence from the model on exact ones. Beside what treadle
has, keys are rounded by channel over 16 and 32 tokens, as KIVI does with all but the last ones.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from cache_kinds import texts
from jaxtyping import Float
from torch import Tensor

from treadle.inference.cache import Cache
from treadle.inference.paged_memory import Paged, PagedMemory
from treadle.inference.quantised import Quantised, QuantisedPages, Smoothed
from treadle.inference.runner import Batch
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.hub.pull import pull
from treadle.tokenizers.tokenizer import Tokenizer


class ByChannel(Cache):
    """Keys as if they were rounded by channel; only for a text that is written in one pass."""

    tokens: int
    """That share a scale."""

    def build(self, model: DecoderModel, *, pages: int, page: int) -> PagedMemory:
        return PagedMemory(model, ChannelPages(self.tokens, model, page, pages), None)


class ChannelPages(QuantisedPages):
    def __init__(self, tokens: int, model: DecoderModel, page: int, pages: int) -> None:
        super().__init__(Quantised(bits=4), model, page, pages)
        self.tokens = tokens

    def encode(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        rounded = torch.cat([rounded_by_channel(part) for part in k.split(self.tokens)])
        return [rounded, *self._pack(v)]

    def decode(self, layer: int, planes: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values, lines = planes
        return keys, self._unpack(values, lines).to(dtype)


def rounded_by_channel(k: Float[Tensor, "T G D"]) -> Float[Tensor, "T G D"]:
    least, most = k.aminmax(dim=0, keepdim=True)
    scale = ((most - least) / 15).half().float().clamp(min=1e-12)
    least = least.half().float()
    return ((k - least) / scale).round().clamp(0, 15) * scale + least


KINDS: dict[str, Cache] = {
    "exact": Paged(),
    "8 bits": Quantised(bits=8),
    "4 bits": Quantised(bits=4),
    "4 bits, smoothed keys": Quantised(bits=4, keys=Smoothed()),
    "4 bits, keys by channel over 16 tokens": ByChannel(tokens=16),
    "4 bits, keys by channel over 32 tokens": ByChannel(tokens=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--length", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load_model(pull("smollm2-135m-instruct").path, dtype=torch.float32)
    rows = texts(Tokenizer.from_gguf(loaded.metadata), args.texts, args.length)
    exact: list[Tensor] = []
    results = {}
    for kind, cache in KINDS.items():
        pages = -(-args.length // 16)
        found = []
        for row in rows:
            runner = TorchRunner(loaded.model, pages=pages, cache=cache)
            batch = Batch(row, [len(row)], [0], [list(range(pages))], [args.tokens])
            found.append(runner.run(batch)[:-1].log_softmax(-1))
        exact = exact or found
        told = torch.tensor([row[1 - args.tokens :] for row in rows])[..., None]
        ours, theirs = torch.stack(found), torch.stack(exact)
        results[kind] = {
            "perplexity": math.exp(-float(ours.gather(-1, told).mean())),
            "divergence": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        }
        print(f"{kind:40} " + "  ".join(f"{n} {v:.4f}" for n, v in results[kind].items()))
    if args.out is not None:
        conditions = {"texts": len(rows), "length": args.length, "tokens": args.tokens}
        args.out.write_text(json.dumps({**conditions, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
