"""The native runner on SmolLM2-135M beside the dense model of the same stored numbers.

They differ by what the runner rounds besides: activations to 8 bits, keys and values to float16.
"""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.native_runner import NativeRunner
from treadle.inference.runner import Batch
from treadle.kernels.compiler import COMPILERS
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.hub.pull import pull
from treadle.tokenizers.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler"),
]
PROMPTS, READ, WRITE = 24, 48, 32
WINDOW = 512


@pytest.fixture(scope="module")
def smollm() -> Path:
    try:
        return pull("smollm2-135m-instruct").path
    except TreadleError as error:
        pytest.skip(f"no SmolLM2: {error}")


@pytest.fixture(scope="module")
def dense(smollm: Path) -> DecoderModel:
    return load_model(smollm).model.float()


@pytest.fixture(scope="module")
def text(smollm: Path, shared_data: Path) -> list[int]:
    """The beginning of WikiText-2's test part."""
    with gzip.open(shared_data / "lm" / "wikitext2_test.txt.gz", "rt", encoding="utf-8") as file:
        words = file.read(60_000)
    return Tokenizer.from_gguf(load_model(smollm).metadata).encode(words, add_special=False)


@torch.no_grad()
def logits_of(model: DecoderModel, tokens: list[int]) -> Tensor:
    return model.logits(model(torch.tensor(tokens)))


def test_greedy_tokens_are_the_dense_model_s(
    smollm: Path, dense: DecoderModel, text: list[int]
) -> None:
    """The dense model reads what the runner wrote, and would have written nearly all of it; where
    not, its own choice was hardly likelier."""
    pages = -(-(READ + WRITE) // 32)
    runner = NativeRunner.open(smollm, pages=PROMPTS * pages)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(PROMPTS)]
    texts = [text[400 * i : 400 * i + READ] for i in range(PROMPTS)]
    flat = [token for tokens in texts for token in tokens]
    ones = [1] * PROMPTS
    logits = runner.run(Batch(flat, [READ] * PROMPTS, [0] * PROMPTS, tables, ones))
    for step in range(WRITE):
        new = logits.argmax(-1).tolist()
        for tokens, token in zip(texts, new, strict=True):
            tokens.append(token)
        logits = runner.run(Batch(new, ones, [READ + step] * PROMPTS, tables, ones))
    same, gaps = 0, []
    for tokens in texts:
        theirs = logits_of(dense, tokens)[READ - 1 : -1]
        chosen = torch.tensor(tokens[READ:])[:, None]
        gap = theirs.amax(-1, keepdim=True) - theirs.gather(1, chosen)
        same += int((gap == 0).sum())
        gaps.append(float(gap.max()))
    agreement = same / (PROMPTS * WRITE)
    print(f"\nagreement {agreement:.4f}, widest gap {max(gaps):.3f}")
    assert agreement > 0.95
    assert max(gaps) < 0.6


def test_perplexity_is_the_dense_model_s(
    smollm: Path, dense: DecoderModel, text: list[int]
) -> None:
    runner = NativeRunner.open(smollm, pages=WINDOW // 32)
    sums = {"native": 0.0, "dense": 0.0}
    windows = [text[at : at + WINDOW] for at in range(0, 12 * WINDOW, WINDOW)]
    for window in windows:
        table = list(range(WINDOW // 32))
        found = {
            "native": runner.run(Batch(window, [WINDOW], [0], [table], [WINDOW])),
            "dense": logits_of(dense, window),
        }
        for name, logits in found.items():
            chosen = torch.tensor(window[1:])
            sums[name] += float(torch.nn.functional.cross_entropy(logits[:-1], chosen))
    perplexity = {name: math.exp(total / len(windows)) for name, total in sums.items()}
    print(f"\nperplexity {perplexity}")
    assert perplexity["native"] == pytest.approx(perplexity["dense"], rel=0.01)
