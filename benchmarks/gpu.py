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
import json
import sys

import race
import torch
from gpu_decoding import decoding
from gpu_kernels import kernels
from gpu_ledger import Ledger
from gpu_training import training

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
