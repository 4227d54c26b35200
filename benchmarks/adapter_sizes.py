"""One base, many adapters: bytes on disk of each kind, beside the base.

    python benchmarks/adapter_sizes.py [--rank 16]

Kinds that PEFT knows are saved as PEFT folders, in float32; of the others it is what a training
keeps of them. Writes results/adapter_sizes.json and prints the table of docs/choose.md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

from common import model_folder
from safetensors.torch import save_file

from treadle.core.files import write_json
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.transform import Transform
from treadle.peft.adalora import AdaLoRA
from treadle.peft.bitfit import BitFit
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.compacter import Kronecker
from treadle.peft.dora import DoRA
from treadle.peft.files import save_adapter
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prefix_files import save_prefix
from treadle.peft.prompt import PromptTuning
from treadle.peft.sparse import SparseDelta

SAVED = {"LoRA", "DoRA", "AdaLoRA", "IA3"}
"""Kinds that PEFT knows: their folder is measured. Of the others, what a training keeps."""


def kinds(rank: int) -> dict[str, Transform]:
    return {
        f"LoRA, rank {rank}, all linear layers": LoRA(rank=rank),
        f"LoRA, rank {rank}, q and v": LoRA(rank=rank, targets=("q", "v")),
        "LoRA, rank 4, q and v": LoRA(rank=4, targets=("q", "v")),
        f"DoRA, rank {rank}": DoRA(rank=rank),
        "AdaLoRA, rank 12": AdaLoRA(),
        "bottleneck adapters (Houlsby)": Bottleneck(),
        "Compacter": Bottleneck(projection=Kronecker()),
        "sparse delta, 0.5% of the weights": SparseDelta(density=0.005),
        "BitFit": BitFit(),
        "(IA)^3": IA3(),
        "prefix, 16 positions": PrefixTuning(),
        "prompt, 16 tokens": PromptTuning(),
    }


def saved(model: DecoderModel, transform: Transform, folder: Path) -> tuple[int, int]:
    """Trained numbers, and bytes on disk."""
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    if type(transform).__name__ in SAVED:
        save_adapter(model, folder)
    elif isinstance(transform, PrefixTuning | PromptTuning):
        save_prefix(model, folder)
    else:
        folder.mkdir()
        save_file(trained, folder / "trained.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir())
    return sum(p.numel() for p in trained.values()), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    rank = parser.parse_args().rank
    base = load_model(model_folder()).model
    weights = sum(p.nbytes for p in base.parameters())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, transform in kinds(rank).items():
            model = transform(copy.deepcopy(base))
            trained, size = saved(model, transform, Path(temporary) / str(len(rows)))
            rows.append({"kind": name, "trained": trained, "bytes": size})
    write_json(
        Path(__file__).parent / "results" / "adapter_sizes.json", {"base": weights, "rows": rows}
    )
    print("| what | trained | on disk | weigh as much as the base |\n|---|---:|---:|---:|")
    print(f"| the base, float32 | {base_count(base):,} | {weights / 1e6:,.1f} MB | |")
    for row in rows:
        many = weights // row["bytes"]
        print(f"| {row['kind']} | {row['trained']:,} | {row['bytes'] / 1e6:,.2f} MB | {many:,} |")


def base_count(model: DecoderModel) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
