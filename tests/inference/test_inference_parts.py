"""Each process reads its part of a file: that part, and no more."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.shards import outline_part, shard
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.gpt2 import gpt2
from treadle.models.hub import load
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.models.llama import tiny_llama
from treadle.models.qwen import qwen2_5_0_5b
from treadle.nn.block import Block
from treadle.nn.mixers.attention import AcrossHeads, Attention

LLAMA = tiny_llama(259, dim=192, layers=2, heads=6, kv_heads=3, hidden=320, context=64)
"""Groups of heads and vocabulary do not divide by two; rows of 192 do not divide into 256."""


def qwen() -> Decoder:
    """Biases on queries, keys and values."""
    real = qwen2_5_0_5b()
    block = real.blocks[0]
    assert isinstance(block, Block)
    mixer = block.mixer.replace(heads=6, kv_heads=3, head_dim=32)
    small = block.replace(mixer=mixer, ffn=block.ffn.replace(hidden=320))
    return real.replace(vocab=259, dim=192, blocks=(small, small))


DECODERS = {
    "llama": LLAMA,
    "qwen": qwen(),
    "gpt2": gpt2(vocab=259, dim=96, layers=2, heads=3, context=64),
}


def built(name: str) -> DecoderModel:
    torch.manual_seed(0)
    model = DECODERS[name].build().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_()
    return model


def same(found: DecoderModel, wanted: DecoderModel) -> None:
    theirs, ours = dict(wanted.named_parameters()), dict(found.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=0)
    for name, module in found.named_modules():
        if name.endswith((".q", ".k", ".v", ".o", ".up", ".gate", ".down", "head")):
            held = module.weight.untyped_storage().nbytes()
            assert held == module.weight.nbytes, f"{name} keeps more than its part in memory"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_parts_of_a_folder(tmp_path: Path, name: str, dtype: torch.dtype, rank: int) -> None:
    save_hf(built(name).to(dtype), tmp_path)
    cut = partial(outline_part, rank=rank, size=2)
    part = load_model(tmp_path, dtype=torch.float32, cut=cut).model
    same(part, shard(load_model(tmp_path, dtype=torch.float32).model, rank, 2))
    assert shard(part, rank, 2) is part, "what is cut stays as it is"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("format", ["F16", "Q8_0", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("name", DECODERS)
def test_parts_of_a_gguf_file(tmp_path: Path, name: str, format: str, rank: int) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(built(name), file, format=format)
    part = load_model(file, cut=partial(outline_part, rank=rank, size=2)).model
    same(part, shard(load_model(file).model, rank, 2))


def test_no_other_block_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers decoded for two parts are those of the model, and of blocks that both need."""
    file = tmp_path / "model.gguf"
    save_gguf(built("llama"), file, format="Q8_0")
    decoded = [0]
    decode = load.dequantise

    def counted(raw: Tensor, *rest: object) -> Tensor:
        numbers = decode(raw, *rest)
        decoded[-1] += numbers.numel()
        return numbers

    monkeypatch.setattr(load, "dequantise", counted)
    whole = load_model(file).model
    matrices = sum(p.numel() for p in whole.parameters() if p.dim() > 1)
    for rank in (0, 1):
        decoded.append(0)
        load_model(file, cut=partial(outline_part, rank=rank, size=2))
        assert 0.3 * matrices < decoded[-1] < 0.7 * matrices
    assert sum(decoded) == matrices, "320 hidden units and heads of 32 are cut between blocks"


def test_a_file_that_cannot_be_cut_is_refused_before_it_is_read(tmp_path: Path) -> None:
    save_hf(built("llama"), tmp_path)
    with pytest.raises(TreadleError, match="3 groups of heads, too few for 4 processes"):
        load_model(tmp_path, cut=partial(outline_part, rank=0, size=4))


def test_a_norm_over_all_heads_is_not_cut() -> None:
    mixer = Attention(heads=6, qk_norm=AcrossHeads())
    decoder = LLAMA.replace(blocks=(Block(mixer=mixer, ffn=LLAMA.blocks[0].ffn),))
    with pytest.raises(TreadleError, match=r"`blocks.0.mixer` has one norm over all heads, which"):
        shard(decoder.build(), rank=0, size=2)


@pytest.mark.slow
def test_a_process_holds_its_part_at_its_peak(tmp_path: Path) -> None:
    """A matrix is decoded from GGUF for the rows that are kept: the peak is below the whole."""
    big = tiny_llama(32_000, dim=768, layers=6, kv_heads=4, hidden=2048, context=64)
    file = tmp_path / "model.gguf"
    save_gguf(big.build(), file, format="Q8_0")
    whole = sum(p.nbytes for p in big.build().parameters())
    script = (
        "import sys\n"
        "from functools import partial\n"
        "from treadle.inference.shards import outline_part\n"
        "from treadle.models.hub.load import load_model\n"
        "from treadle.core.meter import highest_resident as peak\n"
        "before = peak()\n"
        "cut = partial(outline_part, rank=0, size=2) if sys.argv[2] == 'part' else None\n"
        "kept = load_model(sys.argv[1], cut=cut)\n"
        "print(peak() - before)\n"
    )

    def grown(kind: str) -> int:
        command = [sys.executable, "-c", script, str(file), kind]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown("whole") > whole
    assert grown("part") < 0.85 * whole
