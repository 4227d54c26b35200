from __future__ import annotations

import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.ggml import ggml_quantise

from treadle.core.errors import FileFormatError, TreadleError
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.gguf_write import write_gguf

gguf = pytest.importorskip("gguf")

METADATA = {
    "general.architecture": "tiny",
    "general.name": "Ünïcödé",
    "tiny.block_count": 3,
    "tiny.negative": -5,
    "tiny.large": 1 << 40,
    "tiny.rope.freq_base": 10000.0,
    "tiny.flag": True,
    "tokenizer.ggml.tokens": ("a", "", "<|end|>", "Ġt"),
    "tokenizer.ggml.scores": (0.5, -1.5, 0.0, 2.0),
    "tokenizer.ggml.token_type": (1, 1, 3, 1),
    "tiny.flags": (True, False),
}


def tensors(seed: int = 0) -> list[tuple[str, torch.Tensor, str]]:
    random = torch.Generator().manual_seed(seed)
    named = [
        (f"blk.{i}.weight", torch.randn(3, 256 * (i % 2 + 1), generator=random), name)
        for i, name in enumerate(FORMATS)
    ]
    return [
        *named,
        ("norm.weight", torch.randn(5, generator=random), "F32"),
        ("conv.weight", torch.randn(2, 3, 4, 32, generator=random), "Q8_0"),
    ]


@pytest.fixture
def ours(tmp_path) -> Path:
    path = tmp_path / "ours.gguf"
    write_gguf(path, METADATA, iter(tensors()))
    return path


def test_gguf_reads_what_we_wrote(ours):
    reader = gguf.GGUFReader(ours)
    for key, value in METADATA.items():
        content = reader.fields[key].contents()
        assert content == (list(value) if isinstance(value, tuple) else value), key
    types = {name: [t.name for t in field.types] for name, field in reader.fields.items()}
    assert types["tiny.block_count"] == ["UINT32"]
    assert types["tiny.negative"] == ["INT32"]
    assert types["tiny.large"] == ["UINT64"]
    assert types["tiny.rope.freq_base"] == ["FLOAT32"]
    assert types["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"]
    assert types["tiny.flags"] == ["ARRAY", "BOOL"]
    assert [t.name for t in reader.tensors] == [name for name, *_ in tensors()]
    for theirs, (_, tensor, format) in zip(reader.tensors, tensors(), strict=True):
        assert theirs.tensor_type.name == format
        assert tuple(theirs.shape) == tuple(reversed(tensor.shape))
        assert theirs.data_offset % 32 == 0
        values = gguf.quants.dequantize(np.ascontiguousarray(theirs.data), theirs.tensor_type)
        expected = dequantise(quantise(tensor, FORMATS[format]), FORMATS[format])
        np.testing.assert_array_equal(values.reshape(tensor.shape), expected.numpy())


@pytest.mark.parametrize("alignment", [32, 64])
def test_we_read_what_gguf_wrote(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "tiny")
    writer.add_custom_alignment(alignment)
    scalars = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 4000000000,
        "int32": -2000000000,
        "float32": 0.25,
        "uint64": 1 << 63,
        "int64": -(1 << 62),
        "float64": 0.1,
        "bool": True,
        "string": "text",
    }
    for kind, value in scalars.items():
        writer.add_key_value(kind, value, gguf.GGUFValueType[kind.upper()])
    arrays = {
        "[int32]": [1, -2, 3],
        "[string]": ["a", "ä", ""],
        "[float32]": [0.5, -1.0],
        "[bool]": [True, False, True],
    }
    for kind, values in arrays.items():
        writer.add_array(kind, values)
    x = np.random.default_rng(0).standard_normal((6, 64), dtype=np.float32)
    kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    stored = {}
    for name in kinds:
        stored[name] = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
        writer.add_tensor(name, stored[name], raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile.open(tmp_path / "theirs.gguf")
    assert file.version == 3
    for kind, value in scalars.items():
        assert (file.types[kind], file.metadata[kind]) == (kind, value)
        assert type(file.metadata[kind]) is type(value)
    for kind, values in arrays.items():
        assert (file.types[kind], file.metadata[kind]) == (kind, tuple(values))
    assert list(file.tensors) == kinds
    for name in kinds:
        assert file.tensors[name].shape == (6, 64)
        assert file.tensors[name].format == name
        assert file.tensors[name].parameters == 384
        expected = gguf.quants.dequantize(stored[name], gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(file.read(name).numpy(), expected.astype(np.float32))
        np.testing.assert_array_equal(
            file.raw(name).numpy(), stored[name].view(np.uint8).reshape(6, -1)
        )


def test_a_copy_is_identical(ours, tmp_path):
    """Metadata types and stored bytes pass through unchanged."""
    file = GGUFFile.open(ours)
    types = {**file.types, "tiny.block_count": "int64"}
    again = [(name, file.raw(name), info.format) for name, info in file.tensors.items()]
    write_gguf(tmp_path / "same.gguf", file.metadata, again, types=file.types)
    assert (tmp_path / "same.gguf").read_bytes() == ours.read_bytes()
    write_gguf(tmp_path / "other.gguf", file.metadata, again, types=types)
    assert GGUFFile.open(tmp_path / "other.gguf").types["tiny.block_count"] == "int64"


def test_nested_and_empty_arrays(tmp_path):
    path = tmp_path / "a.gguf"
    metadata = {"nested": ((1, 2), (3,)), "empty": (), "floats": ((0.5,), ())}
    types = {"empty": "[string]", "floats": "[[float32]]"}
    write_gguf(path, metadata, [], types=types)
    file = GGUFFile.open(path)
    assert dict(file.metadata) == metadata
    assert dict(file.types) == {"nested": "[[int32]]", **types}
    assert len(file.tensors) == 0


def test_version_2_is_read(ours):
    data = bytearray(ours.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    ours.write_bytes(data)
    file = GGUFFile.open(ours)
    assert file.version == 2
    assert file.metadata["tiny.block_count"] == 3


def test_tensors_are_taken_one_at_a_time(tmp_path):
    """Only one tensor is alive at any moment."""
    given: list[weakref.ref[torch.Tensor]] = []

    def stream():
        for i in range(4):
            assert all(earlier() is None for earlier in given)
            weights = torch.full((64,), float(i))
            given.append(weakref.ref(weights))
            yield f"t{i}", weights, "F32"
            del weights

    write_gguf(tmp_path / "a.gguf", {}, stream())
    assert GGUFFile.open(tmp_path / "a.gguf").read("t3").tolist() == [3.0] * 64


def test_read_gives_memory_of_its_own(ours):
    file = GGUFFile.open(ours)
    file.read("norm.weight").zero_()
    assert file.read("norm.weight").abs().sum() > 0
    assert file.read("norm.weight", torch.bfloat16).dtype == torch.bfloat16


def test_a_failed_write_leaves_the_old_file(ours, tmp_path):
    before = ours.read_bytes()

    def broken():
        yield tensors()[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_gguf(ours, METADATA, broken())
    assert ours.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ours.gguf"]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_truncation_is_refused(ours, data):
    """Up to the last byte of the last tensor: what follows is padding."""
    whole = ours.read_bytes()
    last = max(info.offset + info.nbytes for info in GGUFFile.open(ours).tensors.values())
    cut = ours.with_name("cut.gguf")
    cut.write_bytes(whole[: data.draw(st.integers(0, last - 1))])
    with pytest.raises(FileFormatError, match=r"cut\.gguf: .*fetch the file again"):
        GGUFFile.open(cut)


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1199), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_corruption_never_does_worse_than_an_error(ours, changes):
    """Any bytes of the header changed: it opens, or says so; nothing else."""
    data = bytearray(ours.read_bytes())
    for at, value in changes:
        data[at] = value
    bad = ours.with_name("bad.gguf")
    bad.write_bytes(data)
    try:
        file = GGUFFile.open(bad)
    except FileFormatError:
        return
    for name, info in file.tensors.items():
        if info.format in FORMATS:
            assert file.read(name).shape == info.shape


def header(tensor_count: int, entries: bytes, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + entries


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def u32(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


PAD = bytes(4096)
BAD_FILES = {
    "not a GGUF file .*b'PK": b"PK\3\4" + PAD,
    "not a GGUF file .*git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "too short": b"GGUF",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PAD,
    "version 1, treadle reads 2 and 3": b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + PAD,
    "18,446,744,073,709,551,615 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0) + PAD,
    "1,099,511,627,776 metadata entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + PAD,
    "a metadata key takes 9,223,372,036,854,775,808": header(0, struct.pack("<Q", 1 << 63)) + PAD,
    "a metadata key is not UTF-8": header(0, text(b"\xff\xfe") + PAD),
    "`k` comes twice": header(0, u32(b"k", 1) * 2 + PAD, 2),
    "`k` is of unknown type 13": header(0, text(b"k") + struct.pack("<I", 13) + PAD),
    "`k` is neither true nor false but 2": header(0, text(b"k") + struct.pack("<IB", 7, 2) + PAD),
    "has entries that are neither true": header(
        0, text(b"k") + struct.pack("<IIQB", 9, 7, 1, 2) + PAD
    ),
    "1,152,921,504,606,846,976 metadata `k`": header(
        0, text(b"k") + struct.pack("<IIQ", 9, 10, 1 << 60) + PAD
    ),
    "`k`, entry 1$|`k`, entry 1 ": header(
        0, text(b"k") + struct.pack("<IIQ", 9, 8, 3) + text(b"a") + struct.pack("<Q", 1 << 62) + PAD
    ),
    "`k`, entry 0, is not UTF-8": header(
        0, text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff") + PAD
    ),
    "nests arrays more than 4 deep": header(
        0, text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + PAD
    ),
    "mixes arrays of": header(
        0,
        text(b"k")
        + struct.pack("<IIQ", 9, 9, 2)
        + struct.pack("<IQ", 0, 0)
        + struct.pack("<IQ", 1, 0)
        + PAD,
    ),
    "alignment 24 is not a power of two": header(0, u32(b"general.alignment", 24) + PAD),
    "alignment 0 is not": header(0, u32(b"general.alignment", 0) + PAD),
    "one of 3 parts .*llama-gguf-split --merge": header(0, u32(b"split.count", 3) + PAD),
    "`t` has 5 dimensions": header(1, tensor(shape=(1,) * 5) + PAD, 0),
    "`t` has 0 dimensions": header(1, tensor(shape=()) + PAD, 0),
    "`t` is of unknown format 4": header(1, tensor(kind=4) + PAD, 0),
    "`t` has rows of 33, not a multiple of Q4_0's 32": header(
        1, tensor(shape=(33,), kind=2) + PAD, 0
    ),
    "`t` is not aligned to 32": header(1, tensor(offset=8) + PAD, 0),
    "cut off: tensor `t` ends at byte": header(1, tensor(offset=1 << 50) + PAD, 0),
    "cut off: tensor `t` ends at byte 85,070,591,730": header(
        1, tensor(shape=(2**31, 2**31, 2**31, 2**31)) + PAD, 0
    ),
    "`u` overlaps": header(2, tensor() + tensor(name=b"u", offset=96) + PAD, 0),
    "`t` comes twice": header(2, tensor() + tensor(offset=128) + PAD, 0),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files_are_named(tmp_path, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_FILES[message])
    with pytest.raises(FileFormatError, match=rf"bad\.gguf: .*(?:{message})"):
        GGUFFile.open(path)


def test_reading_mistakes_are_named(ours, tmp_path):
    file = GGUFFile.open(ours)
    with pytest.raises(
        TreadleError, match=r"no tensor `norm\.weigth`; did you mean `norm\.weight`"
    ):
        file.read("norm.weigth")
    with pytest.raises(TreadleError, match=r"absent\.gguf: no such file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    path = tmp_path / "q2.gguf"
    path.write_bytes(header(1, tensor(shape=(256,), kind=10) + PAD, 0))
    other = GGUFFile.open(path)
    assert other.tensors["t"].format == "Q2_K"
    assert other.raw("t").shape == (84,)
    with pytest.raises(TreadleError, match=r"`t` is stored as Q2_K.*take a file in one of F32"):
        other.read("t")


@pytest.mark.parametrize(
    ("metadata", "weights", "message"),
    [
        ({"k": ()}, [], r"metadata `k`: cannot tell the type of \(\).*name the type"),
        ({"k": None}, [], r"metadata `k`: cannot tell the type of None"),
        ({"k": [1]}, [], r"metadata `k`: cannot tell the type of \[1\]"),
        ({"k": (1, "a")}, [], "metadata `k`: an array holds values of one type, not int32, string"),
        ({"k": 1 << 64}, [], "metadata `k`: 18446744073709551616 does not fit the type uint64"),
        ({"general.alignment": 33}, [], "general.alignment 33"),
        ({}, [("t", torch.zeros(33), "Q4_0")], "tensor `t`: rows of 33 weights"),
        ({}, [("t", torch.zeros(()), "F32")], "tensor `t`: 0 dimensions, GGUF holds 1 to 4"),
        ({}, [("t", torch.zeros(32), "Q3")], "tensor `t`: unknown block format `Q3`"),
        ({}, [("t", torch.zeros(32).int(), "F32")], r"tensor `t`: weights are floating .*int32"),
        ({}, [("t", torch.zeros(19).byte(), "Q4_0")], "tensor `t`: rows of 19 bytes"),
        ({}, [("t" * 64, torch.zeros(32), "F32")], "name is longer than ggml's 63 bytes"),
        ({}, [("t", torch.zeros(32), "F32")] * 2, "tensor `t`: the name comes twice"),
    ],
)
def test_writing_mistakes_are_named(tmp_path, metadata, weights, message):
    with pytest.raises(TreadleError, match=message):
        write_gguf(tmp_path / "a.gguf", metadata, weights)
    assert list(tmp_path.iterdir()) == []


def test_types_are_checked(tmp_path):
    for kind, value in {
        "uint8": 256,
        "int32": 1.5,
        "bool": 1,
        "string": 1,
        "[int32]": ("a",),
        "[string]": "abc",
        "float32": "x",
    }.items():
        with pytest.raises(
            TreadleError, match=rf"metadata `k`: .* does not fit the type .*{kind[-5:-1]}"
        ):
            write_gguf(tmp_path / "a.gguf", {"k": value}, [], types={"k": kind})
    with pytest.raises(TreadleError, match="unknown type `unit8`; did you mean `uint8`"):
        write_gguf(tmp_path / "a.gguf", {"k": 1}, [], types={"k": "unit8"})


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> GGUFFile:
    from treadle.models.hub.pull import pull

    try:
        cache = tmp_path_factory.mktemp("cache")
        return GGUFFile.open(pull("smollm2-135m-instruct", cache).path)
    except TreadleError as error:
        pytest.skip(str(error))


def llama_cpp_logits(path: Path) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(model.tokenize(b"The capital of France is Paris, and the capital of Italy"))
    return np.array(model.scores[: model.n_tokens])


@pytest.mark.slow
def test_llama_cpp_gives_the_same_logits_for_a_copy(smollm2, tmp_path):
    copied = [(name, smollm2.raw(name), info.format) for name, info in smollm2.tensors.items()]
    write_gguf(tmp_path / "copy.gguf", smollm2.metadata, copied, types=smollm2.types)
    np.testing.assert_array_equal(
        llama_cpp_logits(tmp_path / "copy.gguf"), llama_cpp_logits(smollm2.path)
    )


@pytest.mark.slow
def test_llama_cpp_runs_every_format_as_well_as_its_own(smollm2, tmp_path):
    """Weights that treadle encodes are no further from the exact logits than llama.cpp's own.

    How far a format strays is the model's and llama.cpp's affair (it rounds activations too, and
    this model's are uneven), so the yardstick is a file that differs in its encoder alone.
    """

    def logits(part: str, format: str, encode) -> np.ndarray:
        def stream():
            for name, info in smollm2.tensors.items():
                if len(info.shape) < 2:
                    yield name, smollm2.raw(name), info.format
                elif part in name:
                    yield name, encode(smollm2.read(name), FORMATS[format]), format
                else:
                    yield name, smollm2.read(name), "F32"

        path = tmp_path / "model.gguf"
        write_gguf(path, smollm2.metadata, stream(), types=smollm2.types)
        found = llama_cpp_logits(path)
        path.unlink()
        return found

    def theirs(x: torch.Tensor, format) -> torch.Tensor:
        return ggml_quantise(x, format.ggml_type, format.block_size, format.block_bytes)

    exact = logits("ffn_down", "F32", quantise)

    def stray(found: np.ndarray) -> float:
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
        return float(1 - ((found * exact).sum(-1) / lengths).mean())

    for format in ("Q4_K", "Q5_K", "Q6_K"):  # only ffn_down has rows of a multiple of 256
        ours = stray(logits("ffn_down", format, quantise))
        reference = stray(logits("ffn_down", format, theirs))
        print(f"{format}: treadle {ours:.5f}, llama.cpp {reference:.5f}")
        assert ours < 1.25 * reference
    for format in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"):
        ours = stray(logits("ffn_up", format, quantise))
        print(f"{format}: treadle {ours:.5f}")
        assert ours < 0.1
