from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from treadle.core.errors import TreadleError
from treadle.tokenizers.cuts import PRES, PROBE, splitter
from treadle.tokenizers.gguf import merges_of
from treadle.tokenizers.stream import TextStream
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

TEXTS = (
    PROBE,
    "a\r\nb\n\n\n  c\t\t\td   e  ",
    " lead",
    "\n",
    "",
    "<|im_start|>user\nhi<|im_end|>",
    "I'll pay 1234567 for 3.5 kg; naïve 日本語 🙂 e\u0301",
)


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF with a tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(metadata["tokenizer.ggml.tokens"]))
    for key, value in metadata.items():
        if key == "tokenizer.ggml.token_type":
            writer.add_token_types(value)
        elif key == "tokenizer.ggml.scores":
            writer.add_token_scores(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_llama_cpp_agrees(path: Path, tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    oracle = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in texts:
        for special in (True, False):
            theirs = oracle.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, parse_special=special) == theirs, (text, special)
    around = oracle.tokenize(b"loom", add_bos=True, special=True)
    assert tokenizer.encode("loom", add_special=True) == around
    ids = tokenizer.encode(PROBE)
    theirs = oracle.detokenize(ids).decode()
    assert theirs.removeprefix(" ") == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """A small SentencePiece BPE as Llama 2 has it: every pair that joins to a token is a merge."""
    words = [
        "▁t",
        "he",
        "▁the",
        "▁tr",
        "ea",
        "dle",
        "▁treadle",
        "oom",
        "▁l",
        "▁loom",
        "▁▁",
        "▁▁▁▁",
        "in",
        "g",
        "ing",
        "▁weav",
        "▁weaving",
    ]
    letters = sorted(set("".join(words) + "abcdefghijklmnopqrstuvwxyz.,'"))
    known = [*words, *letters, "ead", "▁w", "ea", "eav", "▁tread", "oo", "dl", "▁we", "av", "tr"]
    pieces = list(dict.fromkeys(known))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    scores = {p: -float(i) if len(p) > 1 else -1000.0 for i, p in enumerate(pieces)}
    backend = Backend(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges_of(scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:3]])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, special=SpecialTokens(bos="<s>", eos="</s>", unk="<unk>"))


def test_smollm2_file_gives_its_tokenizer(smollm2_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.encode("<|im_start|>user\nHello 12") == [1, 4093, 198, 19556, 216, 33, 34]
    assert tokenizer.special_ids == set(range(17))


def test_smollm2_round_trip(smollm2_metadata: dict[str, Any]) -> None:
    metadata = smollm2_metadata
    written = Tokenizer.from_gguf(metadata).to_gguf_metadata()
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            assert written.pop(key, False) == value, key
    assert set(written) == {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_eos_token"}


def test_smollm2_matches_llama_cpp(smollm2_gguf: Path, smollm2_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    known = tuple(t.replace("\u200d", "") for t in TEXTS)
    assert_llama_cpp_agrees(smollm2_gguf, tokenizer, known)


@pytest.mark.parametrize("name", PRES)
def test_byte_level_round_trip(name: str, story: str) -> None:
    tokenizer = byte_level(name, story)
    metadata = tokenizer.to_gguf_metadata()
    assert metadata["tokenizer.ggml.pre"] == name
    again = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.special == tokenizer.special.__class__(
        bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>", stops=("<|im_end|>",)
    )
    assert again.to_gguf_metadata() == metadata


@pytest.mark.parametrize("name", PRES)
def test_byte_level_matches_llama_cpp(name: str, story: str, tmp_path: Path) -> None:
    tokenizer = byte_level(name, story)
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, tokenizer.to_gguf_metadata(vocab_size=512))
    texts = tuple(t.replace("e\u0301", "é") for t in TEXTS)  # llama.cpp never composes characters
    assert_llama_cpp_agrees(path, Tokenizer.from_gguf(metadata_of(path)), texts)
    assert_llama_cpp_agrees(path, tokenizer, texts)


def byte_level(name: str, story: str) -> Tokenizer:
    tokenizer = ByteLevelBPE(vocab_size=420)([story])
    tokenizer.backend.pre_tokenizer = splitter(PRES[name].patterns)
    tokenizer.backend.model.ignore_merges = PRES[name].ignore_merges
    if PRES[name].nfc:
        tokenizer.backend.normalizer = normalizers.NFC()
    return tokenizer


def test_sentencepiece_round_trip(sentencepiece_like: Tokenizer) -> None:
    metadata = sentencepiece_like.to_gguf_metadata()
    again = Tokenizer.from_gguf(metadata)
    for text in ("the treadle loom weaving", "  loom", "<s>the</s>the", "日本é\n", "", "the  the"):
        ids = sentencepiece_like.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == sentencepiece_like.decode(ids)
        stream = TextStream(again)
        assert "".join([*map(stream.push, ids), stream.end()]) == again.decode(ids)
    assert len(again.encode("the treadle loom")) < 6
    assert again.to_gguf_metadata() == metadata


def test_sentencepiece_matches_llama_cpp(sentencepiece_like: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    metadata = sentencepiece_like.to_gguf_metadata() | {"tokenizer.ggml.add_bos_token": False}
    write_vocabulary(path, metadata)
    texts = ("the treadle loom weaving", "  loom", "the</s>the", "日本é\n", "the  the    the in g")
    assert_llama_cpp_agrees(path, sentencepiece_like, texts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_tokenizers_match_llama_cpp(real_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in real_tokenizers.items():
        tokenizer = Tokenizer.load(folder)
        path = tmp_path / f"{name}.gguf"
        write_vocabulary(path, tokenizer.to_gguf_metadata())
        texts = tuple(t.replace("e\u0301", "é") for t in TEXTS)
        assert_llama_cpp_agrees(path, tokenizer, texts)


def test_padding_rows_are_written_and_dropped(story: str) -> None:
    tokenizer = ByteLevelBPE(vocab_size=300)([story])
    metadata = tokenizer.to_gguf_metadata(vocab_size=320)
    assert len(metadata["tokenizer.ggml.tokens"]) == 320
    assert metadata["tokenizer.ggml.token_type"][-20:] == [5] * 20
    assert Tokenizer.from_gguf(metadata).vocab_size == 300


def test_mistakes_are_named(story: str) -> None:
    tokenizer = ByteLevelBPE(vocab_size=300)([story])
    metadata = tokenizer.to_gguf_metadata()
    with pytest.raises(TreadleError, match=r"no `tokenizer.ggml.model`"):
        Tokenizer.from_gguf({})
    with pytest.raises(TreadleError, match=r"`bert`; byte-level BPE"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(TreadleError, match="did you mean `smollm`"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "smolm"})
    with pytest.raises(TreadleError, match="eos_token_id is 999, but there are 300 tokens"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.eos_token_id": 999})

    tokenizer.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TreadleError, match="no rule that cuts text as this tokenizer does"):
        tokenizer.to_gguf_metadata()
    words = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(TreadleError, match="WordLevel tokenizers cannot be written to GGUF"):
        words.to_gguf_metadata()


def test_merges_that_scores_cannot_tell_are_refused(sentencepiece_like: Tokenizer) -> None:
    backend = Backend.from_str(sentencepiece_like.backend.to_str())
    vocabulary = backend.get_vocab()
    backend.model = models.BPE(
        vocab=vocabulary, merges=[("▁l", "oom")], unk_token="<unk>", byte_fallback=True
    )
    with pytest.raises(TreadleError, match="cannot be told by scores alone"):
        Tokenizer(backend).to_gguf_metadata()
