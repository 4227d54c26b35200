"""Checkpoints there and back: transformers, GGUF, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from models.hf_zoo import ZOO, save
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from treadle.core.errors import ConfigError, FileFormatError, TreadleError
from treadle.models.decoder import Decoder, DecoderModel, LinearHead, swap
from treadle.models.families import family_for_hf
from treadle.models.family import explicit
from treadle.models.gpt2 import gpt2
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.gguf_write import write_gguf
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.models.llama import tiny_llama
from treadle.models.qwen import qwen3_0_6b
from treadle.nn.alibi import ALiBi
from treadle.nn.ffn.ffn import MLP, GatedMLP
from treadle.nn.mixers.attention import Attention

NO_GGUF = {
    "llama-dynamic-rope",
    "llama-longrope",
    "qwen2-window",
    "qwen3-tied-biases",
    "openai-gpt",
    "gemma3-linear-rope",
    "gemma2-scale",
    "qwen3-moe",
    "qwen3-moe-mixed",
    "olmoe-grouped",
    "olmoe-summed",
}
"""llama.cpp's architectures have no such scaling of RoPE, no window in Qwen 2, no biases in
Qwen 3, no GPT-1, no uneven pattern of windows, no scale of Gemma's queries but the released; and
in Qwen 3 no experts whose weights do not sum to 1, and no dense layers between mixtures; in OLMoE
none whose weights do, no biases and no groups of heads."""


def logits(model: DecoderModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens))


def tiny() -> DecoderModel:
    torch.manual_seed(0)
    return tiny_llama(61, dim=32, layers=2, heads=4, kv_heads=2).build()


@pytest.mark.parametrize("name", ZOO)
def test_transformers_reads_what_treadle_wrote(name: str, tmp_path: Path) -> None:
    """Read, written and read again by transformers: nothing left over, the same logits."""
    theirs = save(name, tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    family = theirs.config.model_type.removesuffix("_text")
    save_hf(loaded.model, tmp_path / "ours", family=family)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    again.config._experts_implementation = "eager"
    assert type(again) is type(theirs)
    assert not any(info.values()), info
    tokens = torch.randint(0, 61, (2, 19))
    with torch.no_grad():
        assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ZOO)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    """A folder read and written, in whatever family is first to express it, loses nothing."""
    save(name, tmp_path / "theirs")
    first = load_model(tmp_path / "theirs").model
    save_hf(first, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    second = load_model(tmp_path / "ours").model
    assert explicit(second.config) == explicit(first.config)
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, second.state_dict()[name]), name


@pytest.mark.parametrize("name", [n for n in ZOO if n not in NO_GGUF])
def test_gguf_round_trip_keeps_logits(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").model
    save_gguf(model, tmp_path / "m.gguf", format="F32")
    again = load_model(tmp_path / "m.gguf").model
    assert explicit(again.config) == explicit(model.config)
    kind = name.split("-")[0]
    written = GGUFFile.open(tmp_path / "m.gguf").metadata["general.architecture"]
    renamed = {"mistral": "llama", "mixtral": "llama"}
    assert written == renamed.get(kind, kind) + ("moe" if "-moe" in name else "")
    tokens = torch.randint(0, 61, (2, 19))
    # Gemma's norms are stored as 1 + w and lose their last bits.
    tolerance = 1e-4 if name.startswith("gemma") else 0.0
    assert_close(logits(again, tokens), logits(model, tokens), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(NO_GGUF))
def test_what_gguf_cannot_express_is_refused(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").model
    with pytest.raises(ConfigError, match="no GGUF architecture of llama, qwen2"):
        save_gguf(model, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_transformers_sharded_and_headless_checkpoints_load(tmp_path: Path) -> None:
    theirs = save("llama-tied-mha", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    theirs.model.save_pretrained(tmp_path / "bare")
    tokens = torch.randint(0, 61, (2, 19))
    for folder in ("sharded", "bare"):
        model = load_model(tmp_path / folder).model
        assert_close(logits(model, tokens), theirs(tokens).logits.detach(), rtol=1e-5, atol=1e-5)


def test_dtype_is_that_of_the_file_or_as_asked(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).model.embedding.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).model.norm.weight.dtype == torch.float32


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    save_hf(tiny(), tmp_path)
    model = load_model(tmp_path).model
    assert model.head.weight is model.embedding.weight
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def test_a_tied_weight_saved_twice_is_read_once(tmp_path: Path) -> None:
    model = tiny()
    save_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path)
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="set tie_word_embeddings to false"):
        load_model(tmp_path)


def test_unusual_decoders_go_into_native_folders(tmp_path: Path) -> None:
    """`swap` gives a Llama another feed-forward; it runs, and only treadle can express it."""
    llama = tiny_llama(61, dim=32, layers=2, heads=4)
    swapped = swap(llama, GatedMLP, lambda f: MLP(hidden=f.hidden, activation="relu2"))
    assert swapped.blocks[1].ffn == MLP(hidden=96, activation="relu2")
    assert swapped.blocks[1].mixer == llama.blocks[1].mixer
    model = swapped.build()
    assert save_hf(model, tmp_path) == "treadle"
    again = load_model(tmp_path).model
    assert again.config == swapped
    tokens = torch.randint(0, 61, (2, 9))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(ConfigError, match=r"config.json of llama cannot express this decoder"):
        save_hf(model, tmp_path, family="llama")


@pytest.mark.parametrize(
    ("decoder", "family"),
    [
        (tiny_llama(61, dim=32, layers=2, heads=4), "llama"),
        (swap(tiny_llama(61, dim=32), Attention, lambda a: a.replace(window=8)), "mistral"),
        (swap(tiny_llama(61, dim=32), Attention, lambda a: a.replace(qkv_bias=True)), "qwen2"),
        (qwen3_0_6b(), "qwen3"),
        (gpt2(dim=32, layers=1, heads=2), "gpt2"),
        (swap(tiny_llama(61, dim=32), Attention, lambda a: a.replace(scale=1.0)), "treadle"),
        (
            swap(tiny_llama(61, dim=32), Attention, lambda a: a.replace(positions=ALiBi())),
            "treadle",
        ),
    ],
)
def test_the_family_follows_from_the_decoder(decoder: Decoder, family: str) -> None:
    assert family_for_hf(decoder).name == family


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_hf(tiny(), tmp_path)
    edit(tmp_path, num_hidden_layers=3)
    with pytest.raises(FileFormatError, match=r"lacks model.layers.2.input_layernorm.weight.*more"):
        load_model(tmp_path)
    edit(tmp_path, num_hidden_layers=1)
    with pytest.raises(FileFormatError, match=r"holds model.layers.1.*no place"):
        load_model(tmp_path)
    edit(tmp_path, num_hidden_layers=2, intermediate_size=95)
    with pytest.raises(
        FileFormatError, match=r"mlp.gate_proj.weight of shape \(96, 32\), not \(95, 32\)"
    ):
        load_model(tmp_path)


def test_a_checkpoint_of_another_family_names_both(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    save_hf(tiny(), tmp_path / "llama")
    llama = json.loads((tmp_path / "llama" / "config.json").read_text())
    edit(tmp_path, **{**llama, "num_hidden_layers": fields["n_layer"]})
    with pytest.raises(FileFormatError, match=r"checkpoint of llama as .* says, rather of gpt2"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, r"unknown model_type `lama`; did you mean `llama`\?"),
        ({"model_type": "wavenet9"}, "unknown model_type `wavenet9`; known: bert, gemma, gemma2"),
        ({"hidden_act": "mish"}, "`hidden_act` is 'mish'; treadle knows silu"),
        ({"hidden_size": None}, "config.json lacks `hidden_size`"),
        ({"hidden_size": "wide"}, "`hidden_size` is 'wide', not an integer"),
        ({"rope_scaling": {"rope_type": "yarm"}}, r"unknown rope_type 'yarm'; did you mean `yarn`"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored in gptq's own format"),
    ],
)
def test_bad_configs_are_named(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    save_hf(tiny(), tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(TreadleError, match=message):
        load_model(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    save_hf(tiny(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(TreadleError, match="pickles, which can run code"):
        load_model(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="no such file or folder"):
        load_model(tmp_path / "none")
    with pytest.raises(TreadleError, match=r"no config.json"):
        load_model(tmp_path)


def test_transforms_must_be_undone_before_saving(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[0].mixer.q.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"has blocks.0.mixer.q.extra, .*; merge adapters"):
        save_hf(model, tmp_path / "m")
    model = tiny()
    weight = model.blocks[1].ffn.up.weight.detach()
    del model.blocks[1].ffn.up.weight
    model.blocks[1].ffn.up.register_buffer("weight", weight)  # as a quantised layer has
    with pytest.raises(ConfigError, match=r"lacks blocks.1.ffn.up.weight, which its config has"):
        save_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_formats_follow_llama_cpp(tmp_path: Path) -> None:
    """Vectors F32; embedding that is also the head Q6_K; rows of 288 cannot be Q4_K."""
    decoder = tiny_llama(512, dim=288, layers=1, heads=4, hidden=512)
    save_gguf(decoder.build(), tmp_path / "m.gguf", format="Q4_K")
    formats = {n: t.format for n, t in GGUFFile.open(tmp_path / "m.gguf").tensors.items()}
    assert formats["token_embd.weight"] == "Q8_0"
    assert formats["blk.0.attn_norm.weight"] == "F32"
    assert formats["blk.0.attn_q.weight"] == "Q5_0"
    assert formats["blk.0.ffn_down.weight"] == "Q4_K"
    untied = tiny_llama(512, dim=256, layers=1, heads=4, tied=False)
    save_gguf(untied.build(), tmp_path / "u.gguf", format="Q4_0")
    formats = {n: t.format for n, t in GGUFFile.open(tmp_path / "u.gguf").tensors.items()}
    assert formats["token_embd.weight"] == "Q4_0"
    assert formats["output.weight"] == "Q6_K"


def test_a_gguf_of_unknown_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "lllama"}, [])
    with pytest.raises(ConfigError, match=r"unknown architecture `lllama`; did you mean `llama`\?"):
        load_model(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(FileFormatError, match=r"lacks the key `llama.attention.head_count`"):
        load_model(tmp_path / "m.gguf")


def test_untied_head_is_read_from_gguf(tmp_path: Path) -> None:
    save_gguf(tiny_llama(61, dim=32, tied=False).build(), tmp_path / "m.gguf", format="F16")
    assert load_model(tmp_path / "m.gguf").model.config.head == LinearHead()
