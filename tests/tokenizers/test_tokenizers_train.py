from __future__ import annotations

import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_bpe
from transformers import AutoTokenizer

from treadle.core.errors import TreadleError
from treadle.tokenizers.cuts import GPT2, GPT4
from treadle.tokenizers.pieces import byte_alphabet
from treadle.tokenizers.stream import TextStream
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE


def merges_in(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    alphabet = byte_alphabet()
    model = json.loads(tokenizer.backend.to_str())["model"]
    return [tuple(bytes(alphabet[c] for c in part) for part in m) for m in model["merges"]]


@pytest.mark.parametrize("pattern", [GPT2, GPT4])
@pytest.mark.parametrize("min_frequency", [2, 9])
def test_merges_match_naive_trainer(story: str, pattern: str, min_frequency: int) -> None:
    bpe = ByteLevelBPE(vocab_size=400, pattern=pattern, min_frequency=min_frequency)
    tokenizer = bpe([story])
    naive = naive_bpe.train([story], pattern, 400 - 256 - 3, min_frequency)
    assert merges_in(tokenizer) == naive
    assert len(naive) > 20

    text = story + "Unseen words: loomtreadle 999 ünïcode 🙂"
    ours = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    assert ours == naive_bpe.encode(text, pattern, naive)


def test_tokens_match_tiktoken(trained: Tokenizer, story: str) -> None:
    ranks = {trained.token_bytes(i): i for i in range(3, trained.vocab_size)}
    special = {name: trained.token_id(name) for name in ("<|endoftext|>", "<|im_start|>")}
    oracle = tiktoken.Encoding("ours", pat_str=GPT4, mergeable_ranks=ranks, special_tokens=special)
    for text in (story, "a<|endoftext|>b", "  \n x  ", "CAN'T can't 1234567", "日本\u0301é🙂"):
        assert trained.encode(text) == oracle.encode(text, allowed_special="all")
        assert trained.encode(text, parse_special=False) == oracle.encode_ordinary(text)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert trained.decode(ids, skip_special=False) == sound
    assert trained.decode_bytes(ids) == sound.encode()
    stream = TextStream(trained, skip_special=False)
    assert "".join([*map(stream.push, ids), stream.end()]) == sound


@given(data=st.binary())
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back(trained: Tokenizer, data: bytes) -> None:
    assert trained.decode_bytes(trained.encode_bytes(data)) == data


@given(text=st.text(st.characters(codec="utf-8")))
@settings(max_examples=100, deadline=None)
def test_token_spans_cover_the_text(trained: Tokenizer, text: str) -> None:
    encoded = trained.encode_spans(text)
    assert encoded.ids == trained.encode(text)
    said = [
        (trained.token_bytes(token), start, end)
        for token, start, end in zip(encoded.ids, encoded.starts, encoded.ends, strict=True)
    ]
    reached = 0
    for piece, start, end in said:
        assert start <= reached <= end
        assert piece in text[start:end].encode("utf-8", "replace")
        reached = end
    assert reached == len(text)


def test_batch_equals_one_by_one(trained: Tokenizer, story: str) -> None:
    texts = [*story.splitlines(), "", "<|im_start|>"]
    assert trained.encode_batch(texts) == [trained.encode(t) for t in texts]


def test_opens_in_transformers(trained: Tokenizer, story: str, tmp_path) -> None:
    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(story) == trained.encode(story)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
    assert theirs.decode(trained.encode(story)) == story
    assert theirs.chat_template == trained.chat_template
    again = Tokenizer.load(tmp_path)
    assert again.digest == trained.digest
    assert again.special == trained.special
    assert again.stop_ids == trained.stop_ids == {0, 2}

    other = tmp_path / "theirs"
    theirs.save_pretrained(other)
    assert Tokenizer.load(other).encode(story) == trained.encode(story)
    assert Tokenizer.load(other).chat_template == trained.chat_template


def test_special_tokens_can_be_read_as_letters(trained: Tokenizer) -> None:
    assert trained.encode("<|im_end|>") == [2]
    assert 2 not in trained.encode("<|im_end|>", parse_special=False)
    assert trained.decode([2]) == ""
    assert trained.decode([2], skip_special=False) == "<|im_end|>"


def test_stored_truncation_and_padding_are_off(trained: Tokenizer, tmp_path) -> None:
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(stored))
    assert Tokenizer.load(tmp_path).encode("one two three") == trained.encode("one two three")


def test_mistakes_are_named(trained: Tokenizer, tmp_path) -> None:
    with pytest.raises(TreadleError, match="no text to train"):
        ByteLevelBPE(vocab_size=300)([])
    with pytest.raises(ValueError, match="need at least 259"):
        ByteLevelBPE(vocab_size=200)
    with pytest.raises(ValueError, match="not a regular expression"):
        ByteLevelBPE(vocab_size=300, pattern="(")
    with pytest.raises(ValueError, match="special_tokens is empty"):
        ByteLevelBPE(vocab_size=300, special_tokens=())
    with pytest.raises(TreadleError, match=r"needs a `tokenizer.json`"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TreadleError, match=r"tokenizer.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TreadleError, match="eos token `<nope>` is not in the vocabulary"):
        trained.with_special(eos="<nope>")
