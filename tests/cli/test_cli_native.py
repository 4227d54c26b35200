"""--device auto and native: what is chosen for which model, and that it is said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer
from typer.testing import CliRunner, Result

from treadle.cli.app import build
from treadle.cli.serve import offers_of
from treadle.inference.limits import EngineConfig
from treadle.inference.native_runner import NativeRunner
from treadle.inference.reader import unit
from treadle.inference.torch_runner import TorchRunner
from treadle.kernels.compiler import COMPILERS
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.models.llama import tiny_llama
from treadle.serving.embeddings import pooled
from treadle.serving.pool import Base

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")

NO_MERGES = {"tokenizer.ggml.merges": "[string]"}


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A folder, and beside it the same model in files of several formats."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    decoder = tiny_llama(tokenizer.vocab_size, dim=64, layers=2, hidden=96, context=128)
    built = decoder.replace(std=0.1).build()
    save_hf(built, tmp_path / "tiny")
    tokenizer.save(tmp_path / "tiny")
    metadata = tokenizer.to_gguf_metadata()
    for format in ("Q8_0", "F16"):
        file = tmp_path / f"{format}.gguf"
        save_gguf(built, file, format=format, metadata=metadata, types=NO_MERGES)
    yield tmp_path
    torch.set_num_threads(threads)


def said(path: Path, *options: str) -> Result:
    done = CliRunner().invoke(
        build(), ["generate", str(path), "the loom", "--max-tokens", "5", *options]
    )
    assert done.exit_code == 0, done.output
    return done


def test_files_in_few_bits_run_natively_by_themselves(model: Path) -> None:
    auto = said(model / "Q8_0.gguf")
    assert "native kernels: " in auto.stderr
    assert "Q8_0 as stored" in auto.stderr
    assert said(model / "Q8_0.gguf", "--device", "native").stdout == auto.stdout
    assert not said(model / "Q8_0.gguf", "--device", "cpu").stderr


def test_others_only_when_asked(model: Path) -> None:
    assert "no native kernels: " in (other := said(model / "F16.gguf")).stderr
    assert "is stored as F16" in other.stderr
    assert not said(model / "tiny").stderr
    assert said(model / "tiny").stdout == said(model / "tiny", "--device", "cpu").stdout
    for path in (model / "tiny", model / "F16.gguf"):
        assert "weights rounded to Q8_0" in said(path, "--device", "native").stderr


def test_other_caches_keep_to_torch(model: Path) -> None:
    done = said(model / "Q8_0.gguf", "--cache", "{kind: Contiguous}")
    assert "no native kernels: they keep keys" in done.stderr


def test_a_server_takes_torch_for_the_base_of_adapters(model: Path) -> None:
    file = str(model / "Q8_0.gguf")
    kinds = []
    for adapters in ([], ["a=somewhere"]):
        first, *_ = offers_of([f"m={file}"], adapters, "auto", EngineConfig(slots=2))
        assert isinstance(first, Base)
        kinds.append(type(first.open().runner))
    assert kinds == [NativeRunner, TorchRunner]


def test_embeddings_of_native_kernels_are_the_model_s(model: Path) -> None:
    file = str(model / "Q8_0.gguf")
    (offer,) = offers_of([f"m={file}"], [], "auto", EngineConfig(slots=2))
    assert isinstance(offer, Base)
    tokens = [5, 7, 9, 11, 13] * 9
    with torch.no_grad():
        hidden = load_model(file).model(torch.tensor(tokens)).mean(0)
    ours = unit(pooled(offer.open(), tokens), None)
    assert float(torch.cosine_similarity(ours, hidden, dim=0)) > 0.999
