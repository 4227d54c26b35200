"""How often heads ahead guess right: a small model of bytes, trained with them on Shakespeare.

Each kind of head is trained with its model from the beginning, by the same steps; then texts are
drawn at temperature 1 with and without guesses. Both must be the same; told is how many guesses
were right, and how many tokens a pass of the model gave.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch
from common import DATA
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from treadle.data.batch import Piece, assemble
from treadle.inference.draft_model import EarlyExit
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.mtp_draft import MTPHeads
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.speculative import Draft, NGram
from treadle.models.decoder import DecoderModel
from treadle.models.llama import tiny_llama
from treadle.models.mtp import MTP, AheadHead, ChainedLayer, MedusaHead
from treadle.objectives.multi_token import MultiToken
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer

HEADS: dict[str, AheadHead] = {"Medusa": MedusaHead(), "chained": ChainedLayer()}
DRAFTS: dict[str, Draft] = {
    "heads": MTPHeads(),
    "heads, three at the first": MTPHeads(widths=(3,)),
    "the first layer": EarlyExit(layers=1),
    "look-up": NGram(),
}


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special=SpecialTokens(eos="<end>"))


def trained(head: AheadHead, text: list[int], steps: int) -> tuple[DecoderModel, dict[str, float]]:
    """A model with two heads, and what they and it got right at the end."""
    torch.manual_seed(0)
    decoder = tiny_llama(257, dim=96, layers=3, heads=4, hidden=256, context=256)
    model = MTP(heads=2, head=head)(decoder.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(1)
    right: dict[str, float] = {}
    for _ in range(steps):
        starts = torch.randint(len(text) - 128, (8,), generator=draw).tolist()
        batch = assemble([Piece(text[s : s + 128], [True] * 128) for s in starts])
        output = MultiToken()(model, batch)
        optimizer.zero_grad()
        (output.total / output.weight).backward()
        optimizer.step()
        schedule.step()
        for name, value in output.metrics.items():
            now = float(value / output.weight)
            right[name] = 0.9 * right.get(name, now) + 0.1 * now
    return model.requires_grad_(False).eval(), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    with gzip.open(DATA / "lm" / "tinyshakespeare.txt.gz", "rt") as file:
        text = tokenizer.encode(file.read())
    prompts = [tuple(text[at : at + 40]) for at in range(len(text) - 4000, len(text) - 1000, 500)]
    asked = [
        Request(prompt, Sampling(seed=i, max_tokens=args.tokens))
        for i, prompt in enumerate(prompts)
    ]
    results = []
    for kind, head in HEADS.items():
        model, right = trained(head, text[:-4000], args.steps)
        print(kind, {name: round(value, 3) for name, value in right.items()}, flush=True)
        plain = Engine(model, tokenizer, EngineConfig(cache_tokens=4096)).generate(asked)
        for name, draft in DRAFTS.items():
            limits = EngineConfig(cache_tokens=4096, draft=draft)
            engine = Engine(model, tokenizer, limits)
            found = engine.generate(asked)
            same = [a[0].tokens for a in found] == [b[0].tokens for b in plain]
            row = {
                "heads": kind,
                "draft": name,
                "right of guesses": engine.accepted / engine.guessed if engine.guessed else 0.0,
                "tokens a pass": 1 + engine.accepted / max(1, engine.verified),
                "same text": same,
            }
            results.append({**row, "accuracy in training": right})
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.out is not None:
        found = {"steps": args.steps, "tokens": args.tokens, "results": results}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
