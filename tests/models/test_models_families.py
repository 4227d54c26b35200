"""Every family against transformers: the same weights give the same logits and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.hf_zoo import ZOO, build, checkpoint_gradients, save
from torch.testing import assert_close

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder
from treadle.models.families import FAMILIES, family_of_hf
from treadle.models.gemma import gemma3_270m
from treadle.models.gpt1 import gpt1_117m
from treadle.models.gpt2 import gpt2_medium, gpt2_small, gpt3_small
from treadle.models.hub.fill import applicable
from treadle.models.hub.load import load_model
from treadle.models.llama import smollm2_135m, smollm2_360m
from treadle.models.mistral import mistral_7b
from treadle.models.mixtral import mixtral_8x7b
from treadle.models.olmoe import olmoe_1b_7b
from treadle.models.qwen import qwen2_5_0_5b, qwen3_0_6b
from treadle.models.qwen_moe import qwen3_30b_a3b


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_gradients_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path).double()
    model = load_model(tmp_path, dtype=torch.float64).model
    tokens = torch.randint(0, 61, (2, 23))
    expected = theirs(tokens).logits
    logits = model.logits(model(tokens))
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = checkpoint_gradients(theirs)
    ours = {n: p.grad for n, p in model.named_parameters()}
    family = next(f for f in FAMILIES if f.huggingface.model_type == theirs.config.model_type)
    for rule in applicable(model, family.huggingface.rules(model.config)):
        mapped = rule.map.write(tuple(ours.pop(n) for n in rule.ours))
        for their_name, gradient in zip(rule.theirs, mapped, strict=True):
            assert_close(
                gradient,
                gradients.pop(their_name),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=their_name: f"{n}: {m}",
            )
    assert not ours
    assert not gradients


@pytest.mark.parametrize("name", ["llama-llama3-rope", "qwen2-window", "gemma2", "gemma3"])
def test_configs_of_transformers_4_are_read(name: str) -> None:
    """Without layer types, with rope as theta and scaling."""
    config = build(name).config.to_dict()
    family = family_of_hf(config).huggingface
    old = {k: v for k, v in config.items() if k not in ("layer_types", "rope_parameters")}
    rope = config["rope_parameters"]
    if name == "gemma3":
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    else:
        old["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        old["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    assert family.read(old) == family.read(config)


@pytest.mark.parametrize(
    ("decoder", "parameters"),
    [
        (smollm2_135m(), 134_515_008),
        (smollm2_360m(), 361_821_120),
        (mistral_7b(), 7_241_732_096),
        (mixtral_8x7b(), 46_702_792_704),
        (qwen3_30b_a3b(), 30_532_122_624),
        (olmoe_1b_7b(), 6_919_161_856),
        (qwen2_5_0_5b(), 494_032_768),
        (qwen3_0_6b(), 596_049_920),
        (gemma3_270m(), 268_098_176),
        (gpt1_117m(), 116_534_784),
        (gpt2_small(), 124_439_808),
        (gpt2_medium(), 354_823_168),
        (gpt3_small(), 125_226_240),
    ],
)
def test_presets_have_the_published_size(decoder: Decoder, parameters: int) -> None:
    with torch.device("meta"):
        model = decoder.build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_clipped_queries_are_refused() -> None:
    config = build("olmoe").config.to_dict()
    with pytest.raises(ConfigError, match=r"`clip_qkv` is 8.0, which treadle does not have"):
        family_of_hf(config).huggingface.read({**config, "clip_qkv": 8.0})
