"""What is foretold against what `treadle run` then takes: the peak in the run's own manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.core.config import to_yaml
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, read_manifest
from treadle.data.batch import Piece, assemble
from treadle.data.corpus import TextCorpus
from treadle.data.texts import TextFiles
from treadle.distillation.cached import Cached
from treadle.distillation.students import Thinned
from treadle.distillation.taught import Live, Taught
from treadle.models.decoder import Decoder
from treadle.models.hub.load import read_decoder
from treadle.models.hub.pull import pull
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh, ModelSource, Pretrained
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.optim.adamw8bit import AdamW8bit
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.dora import DoRA
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.planning.rehearse import Job, rehearse_all
from treadle.quantization.nf4 import NF4
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.precision import BF16, FP32
from treadle.train.recompute import Recompute
from treadle.train.run import Run
from treadle.train.tokenizer import TrainTokenizer

ROWS, WIDTH = 4, 256
ADAMW, LORA = AdamW(lr=1e-4), (LoRA(rank=16),)
CASES = {
    "full": {},
    "full-fp32": {"precision": FP32()},
    "full-recomputed": {"transforms": (Recompute(),)},
    "lora": {"transforms": LORA},
    "lora-fp32": {"transforms": LORA, "precision": FP32()},
    "lora-8x256": {"transforms": LORA, "rows": 8},
    "lora-1x1024": {"transforms": LORA, "rows": 1, "width": 1024},
    "dora": {"transforms": (DoRA(rank=16),)},
    "qlora": {"transforms": (NF4(), *LORA), "optimizer": AdamW8bit(lr=1e-4)},
    "adapter": {"transforms": (Bottleneck(),)},
    "prefix": {"transforms": (PrefixTuning(),)},
}
LAYERS = (0, 3, 6, 9, 12, 16, 19, 22, 26, 29)
LESSONS = {"live": Live(), "cached": Cached()}


def corpus(folder: Path, rows: int, width: int) -> TextCorpus:
    """Micro-batches of exactly rows x width tokens, two a step."""
    path = folder / "text.txt"
    path.write_text("\n".join(f"The number that follows {i} is {i + 1}." for i in range(8_000)))
    return TextCorpus(
        documents=TextFiles(path=str(path), separator="\n"),
        context=width,
        tokens_per_step=2 * rows * width,
        tokens=rows * width,
    )


def measured(
    folder: Path, model: ModelSource, *, rows=ROWS, width=WIDTH, teacher=None, lesson=None, **case
) -> int:
    """Peak of the training step of `treadle run`, in bytes."""
    text = corpus(folder, rows, width)
    source = Taught(source=text, teacher=teacher, lesson=lesson) if teacher else text
    run = Run(
        name="train",
        model=model,
        source=source,
        optimizer=case.pop("optimizer", ADAMW),
        objective=case.pop("objective", CausalLM()),
        fit=Fit(steps=2, precision=case.pop("precision", BF16())),
        **case,
    )
    tokenizer = TrainTokenizer(documents=text.documents, tokenizer=ByteLevelBPE(vocab_size=4096))
    steps = (tokenizer, run) if isinstance(model, Fresh) else (run,)
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(Pipeline(name="p", steps=steps)))
    command = [sys.executable, "-m", "treadle", "run", str(recipe), "--dir", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True)
    return int(read_manifest(folder / "run" / "train")["cost"]["peak_bytes"])


def foretold(decoder: Decoder, *, rows=ROWS, width=WIDTH, **case) -> int:
    batch = assemble([Piece([1] * width, [True] * width)] * rows)
    case = {"optimizer": ADAMW, "precision": BF16(), **case}
    needs = rehearse_all([Job(decoder=decoder, batches=(batch, batch), **case)])[0]
    note(f"    {needs}")
    return needs.resident


def note(line: str) -> None:
    print(line)
    if log := os.environ.get("TREADLE_PLAN_LOG"):
        with Path(log).open("a") as file:
            file.write(line + "\n")


def compare(name: str, expected: int, found: int) -> None:
    line = (
        f"| {name} | {expected / 2**20:.0f} MiB | {found / 2**20:.0f} MiB "
        f"| {expected / found - 1:+.1%} |"
    )
    note(line)
    assert abs(expected / found - 1) <= 0.10, line


@pytest.fixture(scope="module")
def smollm2() -> Decoder:
    try:
        return read_decoder(pull("smollm2-135m-instruct").path)
    except TreadleError:
        pytest.skip("smollm2-135m-instruct is not here")


BASE = Pretrained(name="smollm2-135m-instruct")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peak_is_within_ten_percent(name: str, smollm2: Decoder, tmp_path: Path) -> None:
    compare(name, foretold(smollm2, **CASES[name]), measured(tmp_path, BASE, **CASES[name]))


@pytest.mark.slow
def test_peak_of_fresh_model_is_within_ten_percent(tmp_path: Path) -> None:
    decoder = tiny_llama(4096, dim=768, layers=12, heads=12, hidden=2048, context=512)
    model = Fresh(decoder=decoder, step="tokenizer")
    compare("full-fresh", foretold(decoder), measured(tmp_path, model))


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_peak_of_distillation_is_within_ten_percent(
    name: str, smollm2: Decoder, tmp_path: Path
) -> None:
    student = smollm2.replace(blocks=tuple(smollm2.blocks[i] for i in LAYERS))
    case = {"objective": Distil(terms=(SoftLabels(),)), "lesson": LESSONS[name]}
    expected = foretold(student, teacher=smollm2, **case)
    found = measured(tmp_path, Thinned(model=BASE, layers=LAYERS), teacher=BASE, **case)
    compare(f"distillation-{name}", expected, found)
