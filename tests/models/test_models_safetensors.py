from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from treadle.core.errors import FileFormatError, TreadleError
from treadle.models.hub.safetensors import open_safetensors, save_safetensors


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(10, 4, generator=random),
        "half": torch.randn(3, 5, generator=random).bfloat16(),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(7),
        "empty": torch.zeros(0, 3),
    }


def assert_same(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_one_file_both_ways(tmp_path):
    assert save_safetensors(tmp_path / "m", tensors().items(), metadata={"step": "3"}) == [
        tmp_path / "m" / "model.safetensors"
    ]
    assert_same(load_file(tmp_path / "m" / "model.safetensors"), tensors())
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"a": "b"})
    for place in (tmp_path, tmp_path / "theirs.safetensors"):
        opened = open_safetensors(place)
        assert_same(opened, tensors())
        assert opened.metadata == {"a": "b"}
    opened = open_safetensors(tmp_path / "m")
    assert opened.metadata == {"format": "pt", "step": "3"}
    assert opened.shape("embed") == (10, 4)
    assert "embed" in opened
    assert "absent" not in opened
    assert len(opened) == 5


def test_shards_hold_at_most_their_bytes(tmp_path):
    named = [(f"t{i}", torch.full((25,), float(i))) for i in range(7)]
    paths = save_safetensors(tmp_path, named, max_shard_bytes=250)
    assert [p.name for p in paths] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [len(load_file(p)) for p in paths] == [2, 2, 2, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 700}
    assert index["weight_map"]["t3"] == "model-00002-of-00004.safetensors"
    opened = open_safetensors(tmp_path)
    assert list(opened) == [f"t{i}" for i in range(7)]
    assert_same(opened, dict(named))


def test_transformers_reads_and_writes_the_same_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    read = open_safetensors(tmp_path / "theirs")
    assert_same(read, model.state_dict())
    save_safetensors(tmp_path / "ours", read.items(), max_shard_bytes=6000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    config.save_pretrained(tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(again.state_dict(), model.state_dict())


def test_views_and_shared_memory_are_written_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    named = {"base": base, "same": base, "transposed": base.t(), "row": base[1]}
    save_safetensors(tmp_path, named.items())
    assert_same(load_file(tmp_path / "model.safetensors"), named)
    assert (tmp_path / "model.safetensors").stat().st_size < 800  # no whole storage for a row


def test_files_can_be_read_by_others(tmp_path):
    (path,) = save_safetensors(tmp_path, tensors().items())
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_one_shard_in_memory_at_once(tmp_path):
    given: list[weakref.ref[torch.Tensor]] = []

    def stream():
        for i in range(6):
            assert sum(earlier() is not None for earlier in given) <= 2
            tensor = torch.full((25,), float(i))
            given.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    assert len(save_safetensors(tmp_path, stream(), max_shard_bytes=250)) == 3


def test_a_failed_write_leaves_the_old_weights(tmp_path):
    save_safetensors(tmp_path, tensors().items())

    def broken():
        yield "a", torch.zeros(100)
        yield "b", torch.zeros(100)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        save_safetensors(tmp_path, broken(), max_shard_bytes=400)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(open_safetensors(tmp_path), tensors())


def test_shards_replace_one_file_and_are_not_replaced(tmp_path):
    save_safetensors(tmp_path, tensors().items())
    named = {f"t{i}": torch.zeros(100) for i in range(2)}
    save_safetensors(tmp_path, named.items(), max_shard_bytes=400)
    assert_same(open_safetensors(tmp_path), named)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(TreadleError, match=r"holds sharded weights .* name a new folder"):
        save_safetensors(tmp_path, named.items())
    save_safetensors(tmp_path, tensors().items(), stem="adapter_model")  # another model's name


@pytest.fixture
def shards(tmp_path) -> Path:
    named = [(f"t{i}", torch.full((25,), float(i))) for i in range(4)]
    save_safetensors(tmp_path, named, max_shard_bytes=250)
    return tmp_path


def test_missing_and_broken_shards_are_named(shards):
    first, second = sorted(shards.glob("*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match=r"00002-of-00002\.safetensors: cut off.*fetch"):
        open_safetensors(shards)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FileFormatError, match=r"`t2` is not in model-00002.*different models"):
        open_safetensors(shards)
    second.unlink()
    with pytest.raises(
        FileFormatError, match=r"index\.json: 1 of 2 shards are missing: model-00002"
    ):
        open_safetensors(shards)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"index\.json: not an index of shards"):
        open_safetensors(shards)


def test_an_index_cannot_reach_outside(shards):
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": "../model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileFormatError, match=r"`\.\./model.*` is outside|outside its folder"):
        open_safetensors(index)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_truncation_is_refused(tmp_path, data):
    save_safetensors(tmp_path, tensors().items())
    whole = (tmp_path / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FileFormatError, match=r"cut\.safetensors: cut off or corrupt.*fetch"):
        open_safetensors(cut)


def test_a_hostile_header_is_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    head = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
    with pytest.raises(FileFormatError, match=r"bad\.safetensors: cut off or corrupt"):
        open_safetensors(path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(TreadleError, match=r"no \.safetensors file here; name the folder"):
        open_safetensors(tmp_path)
    with pytest.raises(TreadleError, match=r"absent: no such file"):
        open_safetensors(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TreadleError, match="pickles, which can run code and are never loaded"):
        open_safetensors(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(TreadleError, match=r"name its \.gguf file instead"):
        open_safetensors(tmp_path)
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TreadleError, match=r"2 \.safetensors files and 0 indices"):
        open_safetensors(tmp_path)
    with pytest.raises(KeyError, match="no tensor `y`"):
        open_safetensors(tmp_path / "a.safetensors")["y"]
    with pytest.raises(TreadleError, match="two tensors are called `x`"):
        save_safetensors(tmp_path / "m", [("x", torch.zeros(1))] * 2)
