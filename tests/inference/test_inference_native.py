"""The native runner against the dense model that holds the same rounded weights."""

from __future__ import annotations

import shutil
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.inference.native_runner import NativeRunner
from treadle.inference.runner import Batch
from treadle.kernels.attention import AttentionRule
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.kernels.compiler import COMPILERS
from treadle.kernels.native.levels import LEVELS, features
from treadle.kernels.native.matrix import round_groups
from treadle.models.decoder import Decoder, DecoderModel, swap
from treadle.models.gemma import gemma3_270m
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf
from treadle.models.llama import tiny_llama
from treadle.nn.context import Packed
from treadle.nn.ffn.ffn import MLP, GatedMLP
from treadle.nn.ffn.moe import MoE
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm, PostNorm, PreNorm, RMSNorm
from treadle.nn.rope import RoPE
from treadle.nn.rope_scaling import LinearScaling

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")

VOCAB = 203
TINY = tiny_llama(VOCAB, dim=96, layers=3, heads=6, kv_heads=2, hidden=160, context=128)
UNTIED = tiny_llama(VOCAB, dim=64, layers=2, heads=2, hidden=96, context=128, tied=False)
PAGE = 16


def model_of(decoder: Decoder) -> DecoderModel:
    torch.manual_seed(0)
    model = decoder.replace(std=0.15).build()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
def rounded(model: DecoderModel, format: str) -> DecoderModel:
    """The model with weights as the runner stores them."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            kind = FORMATS[format if name.startswith("blocks.") else "Q8_0"]
            module.weight.copy_(dequantise(quantise(module.weight, kind), kind))
    return model


def tokens_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(tokens: list[int], table: list[int]) -> Batch:
    return Batch(tokens, [len(tokens)], [0], [table], [len(tokens)])


class HalfPrecisionCache(Packed):
    """Keys and values in float16, as the runner keeps them."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule
    ) -> Float[Tensor, "N H D"]:
        return super().attend(layer, q, k.half().float(), v.half().float(), rule)


@torch.no_grad()
def apart(runner: NativeRunner, decoder: Decoder, format: str, texts: int = 8) -> Tensor:
    """Of each of 40 positions, how far the logits are from those of the dense model that rounds
    all that the runner rounds, in the text where they are nearest.

    Sums of float32 differ in their last bits, until somewhere in a text one of them puts an
    activation on the other side of its rounding: in one of several texts, that is late.
    """
    model = rounding_activations(rounded(model_of(decoder), format))
    packed = Packed.of(Layout.rows(1, 40))
    distances = []
    for seed in range(texts):
        tokens = tokens_of(40, seed)
        context = HalfPrecisionCache(packed.positions, packed.length, packed.layout)
        theirs = model.logits(model(torch.tensor(tokens), context))
        ours = runner.run(whole(tokens, [4, 0, 2]))
        distances.append((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1))
    assert float(torch.stack(distances).max()) < 0.06
    return torch.stack(distances).amin(0)


@torch.no_grad()
def dense_logits(model: DecoderModel, tokens: list[int]) -> Tensor:
    return model.logits(model(torch.tensor(tokens)))


def divergence(theirs: Tensor, ours: Tensor) -> float:
    """KL(theirs || ours), of the worst token."""
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


def rounding_activations(model: DecoderModel) -> DecoderModel:
    """The model with the inputs of all products rounded to 8 bits, as the runner rounds them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (round_groups(args[0]),))
    return model


@pytest.mark.parametrize("decoder", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_logits_are_those_of_the_dense_model(decoder: Decoder, format: str) -> None:
    runner = NativeRunner.of_model(model_of(decoder), format=format, page=PAGE, pages=9)
    tokens = tokens_of(75)
    ours = runner.run(whole(tokens, [8, 0, 3, 5, 1]))
    dense = dense_logits(rounded(model_of(decoder), format), tokens)
    assert ours.shape == (75, VOCAB)
    assert float(F.cosine_similarity(ours, dense).min()) > 0.99
    assert divergence(dense, ours) < 2e-2
    assert float(apart(runner, decoder, format).quantile(0.75)) < 2e-6


def test_rope_of_part_of_a_head_scaled_positions_and_shifted_norms() -> None:
    rope = RoPE(theta=500.0, scaling=LinearScaling(factor=4.0), fraction=0.5)
    decoder = swap(TINY, Attention, lambda a: a.replace(positions=rope, head_dim=32, scale=0.1))
    decoder = swap(decoder, RMSNorm, lambda n: n.replace(offset=0.25, eps=1e-3))
    runner = NativeRunner.of_model(model_of(decoder), format="Q8_0", page=PAGE, pages=5)
    assert float(apart(runner, decoder, "Q8_0").quantile(0.75)) < 2e-6


def with_attention(**fields: object) -> Decoder:
    return swap(TINY, Attention, lambda a: a.replace(**fields))


def gated(activation: str, *, bias: bool = False) -> Decoder:
    return swap(TINY, GatedMLP, lambda f: f.replace(activation=activation, bias=bias))


def gemma3() -> Decoder:
    """Five of six layers with a window and positions of their own; odd sizes of heads."""
    decoder = gemma3_270m()
    small = swap(decoder, GatedMLP, lambda f: f.replace(hidden=160))
    small = swap(
        small,
        Attention,
        lambda a: a.replace(
            heads=4, kv_heads=1, head_dim=48, window=a.window and 24, scale=0.1, softcap=20.0
        ),
    )
    return small.replace(  # type: ignore[no-any-return]
        vocab=VOCAB, dim=96, context=128, blocks=small.blocks[4:6], softcap=30.0
    )


FAMILIES = {
    "biases of Qwen 2": with_attention(qkv_bias=True),
    "biases everywhere": swap(
        with_attention(qkv_bias=True, out_bias=True), GatedMLP, lambda f: f.replace(bias=True)
    ),
    "norms of Qwen 3": with_attention(qk_norm=RMSNorm(), head_dim=32),
    "window of Mistral": with_attention(window=20),
    "window of a page": with_attention(window=16, heads=2, kv_heads=2),
    "Gemma 1": swap(gated("gelu_tanh"), RMSNorm, lambda n: n.replace(offset=1.0)).replace(
        embedding_scale=96**0.5
    ),
    "Gemma 3, and the soft caps of Gemma 2": gemma3(),
    **{name: gated(name) for name in ("gelu", "relu", "relu2")},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_those_of_the_dense_model(name: str) -> None:
    """The whole text at once, and again in pieces that end inside and at the edges of pages."""
    decoder = FAMILIES[name]
    runner = NativeRunner.of_model(model_of(decoder), format="Q8_0", page=PAGE, pages=6)
    tokens, table = tokens_of(75), [4, 2, 0, 1, 3]
    assert float(apart(runner, decoder, "Q8_0").quantile(0.75)) < 2e-6
    ours = runner.run(whole(tokens, table))
    pieces = []
    for start, end in pairwise((0, 31, 32, 33, 60, 75)):
        part = tokens[start:end]
        pieces.append(runner.run(Batch(part, [end - start], [start], [table], [end - start])))
    assert_close(torch.cat(pieces), ours, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("level", [level.name for level in LEVELS if level.needs <= features()])
def test_whole_decoders_on_every_instruction_set(level: str) -> None:
    for decoder, format in ((TINY, "Q4_0"), (FAMILIES["biases everywhere"], "Q8_0")):
        runner = NativeRunner.of_model(
            model_of(decoder), format=format, page=PAGE, pages=6, level=level
        )
        assert runner.level == level
        assert float(apart(runner, decoder, format).quantile(0.75)) < 2e-6
    soft = NativeRunner.of_model(model_of(gemma3()), page=PAGE, pages=6, level=level)
    assert float(apart(soft, gemma3(), "Q8_0").quantile(0.75)) < 2e-6


def test_gates_beyond_the_range_of_exp_close() -> None:
    """exp(100) does not fit in a float32; the gate of -100 is nothing all the same."""

    def steep() -> DecoderModel:
        model = model_of(UNTIED.replace(blocks=UNTIED.blocks[:1]))
        with torch.no_grad():
            model.get_parameter("blocks.0.ffn.gate.weight").mul_(200)
        return model

    runner = NativeRunner.of_model(steep(), format="Q8_0", page=PAGE, pages=1)
    same = rounding_activations(rounded(steep(), "Q8_0"))
    for token in range(8):
        expected = dense_logits(same, [token])
        assert_close(runner.run(whole([token], [0])), expected, atol=0.05, rtol=0.05)


def test_batched_and_in_pieces_equals_one_by_one() -> None:
    """One pass with the next token of two sequences, a piece of a prompt and a new prompt."""
    runner = NativeRunner.of_model(model_of(TINY), page=PAGE, pages=20)
    texts = [tokens_of(n, seed) for seed, n in enumerate((40, 17, 50, 5))]
    expected = [runner.run(whole(t, [16, 17, 18, 19])) for t in texts]
    tables = [[3, 1, 7], [0, 9], [4, 2, 8, 11], [10]]
    first = [39, 16, 20, 0]
    for text, table, count in zip(texts, tables, first, strict=True):
        if count:
            runner.run(Batch(text[:count], [count], [0], [table], [0]))
    counts = [1, 1, 25, 5]
    pieces = [t[s : s + c] for t, s, c in zip(texts, first, counts, strict=True)]
    outputs = [1, 1, 0, 2]
    out = runner.run(Batch(list(chain(*pieces)), counts, first, tables, outputs))
    rest = runner.run(Batch(texts[2][45:], [5], [45], [tables[2]], [1]))
    assert_close(out[0], expected[0][-1], atol=2e-4, rtol=1e-4)
    assert_close(out[1], expected[1][-1], atol=2e-4, rtol=1e-4)
    assert_close(out[2:], expected[3][-2:], atol=2e-4, rtol=1e-4)
    assert_close(rest[0], expected[2][-1], atol=2e-4, rtol=1e-4)


def test_shared_copied_saved_and_loaded_pages() -> None:
    runner = NativeRunner.of_model(model_of(TINY), page=PAGE, pages=6)
    text = tokens_of(20)
    runner.run(whole(text, [0, 1]))
    step = Batch([5], [1], [20], [[0, 1]], [1])
    expected = runner.run(step)
    runner.copy(1, 2)
    runner.load(4, runner.save(0))
    for table in ([0, 2], [4, 2]):
        assert torch.equal(runner.run(Batch([5], [1], [20], [table], [1])), expected)
    both = Batch([5, 9], [1, 1], [20, 20], [[0, 1], [0, 2]], [1, 1])
    assert_close(runner.run(both)[:1], expected)


def test_likeliest_tokens_and_sums_are_torch_s() -> None:
    """Rows that end inside a vector, lie apart, hold equals, or hold what is forbidden."""
    runner = NativeRunner.of_model(model_of(TINY), page=PAGE, pages=1)
    logits = torch.randn(9, 260)[:, :VOCAB] * torch.logspace(-2, 2, 9)[:, None]
    logits[0, [7, 19, 202]] = 50.0
    logits[1, 202] = 50.0
    logits[2, : VOCAB - 1] = -torch.inf
    logits[3, :190] = -torch.inf
    for rows in (logits, logits[::2], logits[[4, 1, 3]], logits.double(), logits[:0]):
        tokens, sums = runner.peaks(rows)
        assert tokens.equal(rows.argmax(-1))
        assert_close(sums, rows.logsumexp(-1), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    text = tokens_of(30)
    one = NativeRunner.of_model(model_of(TINY), page=PAGE, pages=2, threads=1).run(
        whole(text, [0, 1])
    )
    many = NativeRunner.of_model(model_of(TINY), page=PAGE, pages=2, threads=threads)
    assert torch.equal(many.run(whole(text, [0, 1])), one)


def test_blocks_of_a_gguf_file_are_taken_as_they_are(tmp_path: Path) -> None:
    """Rounding them again would move Q4_0's scales; the rows of q and k are put in our order."""
    file = tmp_path / "m.gguf"
    save_gguf(model_of(TINY), file, format="Q4_0", metadata={"tokenizer.ggml.model": "no_vocab"})
    runner = NativeRunner.open(file, page=PAGE, pages=4)
    tokens = tokens_of(40)
    theirs = dense_logits(load_model(file).model.float(), tokens)
    ours = runner.run(whole(tokens, [0, 1, 2]))
    assert runner.formats == ("Q4_0", "Q8_0")
    assert float(F.cosine_similarity(ours, theirs).min()) > 0.99


@pytest.mark.parametrize("format", ["F16", "BF16"])
def test_files_in_other_formats_are_rounded_by_name_only(tmp_path: Path, format: str) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(model_of(TINY), file, format=format, metadata={"tokenizer.ggml.model": "no_vocab"})
    with pytest.raises(TreadleError, match="name one as `format`"):
        NativeRunner.open(file, page=PAGE, pages=4)
    named = NativeRunner.open(file, page=PAGE, pages=4, format="Q8_0")
    tokens = tokens_of(9)
    assert named.run(whole(tokens, [0])).shape == (9, VOCAB)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (with_attention(causal=False), "attention that looks ahead"),
        (with_attention(qk_norm=RMSNorm(eps=0.5)), "the queries' and keys' norm"),
        (
            with_attention(head_dim=24, heads=4, kv_heads=2),
            "head_dim=24, which is no multiple of 16",
        ),
        (swap(TINY, GatedMLP, lambda f: MLP(hidden=f.hidden)), "the feed-forward MLP"),
        (
            swap(TINY, GatedMLP, lambda f: MoE(expert=f, experts=4, top_k=2)),
            "the feed-forward MoE",
        ),
        (swap(TINY, PreNorm, lambda p: PostNorm()), "the placement PostNorm"),
        (swap(TINY, RMSNorm, lambda n: LayerNorm()), "the norm LayerNorm"),
        (TINY.replace(learned_positions=True), "learned positions"),
        (TINY.replace(blocks=(*TINY.blocks, *UNTIED.blocks)), "blocks that differ"),
    ],
)
def test_other_models_are_refused_by_the_part_they_have(decoder: Decoder, message: str) -> None:
    with pytest.raises(TreadleError, match=f"{message}.*use the torch path"):
        NativeRunner.of_model(decoder.build())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch([VOCAB], [1], [0], [[0]], [1]), "a token outside the vocabulary of 203"),
        (Batch([1, 2], [1], [0], [[0]], [1]), r"counts \[1\] of 2 tokens"),
        (Batch([1], [1], [16], [[0]], [1]), "1 pages for 17 tokens"),
        (Batch([1], [1], [0], [[7]], [1]), r"a page outside 0 \.\. 1"),
        (Batch([1], [1], [128], [[0] * 9], [1]), "129 tokens, the context has 128"),
        (Batch([1], [1], [0], [[0]], [2]), "1 new tokens at 0, 2 with logits"),
    ],
)
def test_a_wrong_batch_never_reaches_native_code(batch: Batch, message: str) -> None:
    with pytest.raises(TreadleError, match=message):
        NativeRunner.of_model(model_of(TINY), page=PAGE, pages=2).run(batch)


def test_bad_settings() -> None:
    with pytest.raises(TreadleError, match="page=24: native pages hold a multiple of 16"):
        NativeRunner.of_model(model_of(TINY), page=24)
    with pytest.raises(TreadleError, match="no products of F16; choose Q4_0, Q4_1, Q5_0"):
        NativeRunner.of_model(model_of(TINY), format="F16")
