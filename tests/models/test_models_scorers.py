"""Reward models of transformers, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from models.hf_zoo import ZOO, build
from torch.testing import assert_close

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model, read_decoder
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.reward_head import RewardHead, ScalarHead

SCORED = [name for name in ZOO if not name.startswith("olmoe")]
"""transformers has no reward models of OLMoE."""


def save_scorer(name: str, folder: Path, labels: int = 1) -> transformers.PreTrainedModel:
    """The body of one of the zoo, with weights of its own and a head for scores."""
    config = build(name).config
    config.num_labels, config.pad_token_id = labels, 0
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            wild = torch.randn_like(parameter) * 0.25
            parameter.copy_(wild if parameter.ndim > 1 else parameter + wild)
    model.save_pretrained(folder)
    return model


def scores(model: DecoderModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model(tokens)[:, -1])


@pytest.mark.parametrize("name", SCORED)
def test_scores_match_transformers_both_ways(name: str, tmp_path: Path) -> None:
    theirs = save_scorer(name, tmp_path / "theirs")
    assert isinstance(read_decoder(tmp_path / "theirs").head, ScalarHead)
    loaded = load_model(tmp_path / "theirs").model
    tokens = torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits[:, 0]
    assert_close(scores(loaded, tokens), expected, rtol=1e-4, atol=1e-4)
    family = theirs.config.model_type.removesuffix("_text")
    save_hf(loaded, tmp_path / "ours", family=family, fields={"pad_token_id": 0})
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert type(again).__name__ in again.config.architectures
    assert not any(info.values()), info
    with torch.no_grad():
        assert_close(again(tokens).logits[:, 0], expected, rtol=0, atol=1e-5)


def test_a_trained_head_is_saved_with_its_body(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RewardHead()(tiny_llama(61, dim=32, layers=2, heads=4, kv_heads=2).build())
    torch.nn.init.normal_(model.head.linear.weight)
    assert save_hf(model, tmp_path) == "llama"
    again = load_model(tmp_path).model
    assert again.config.replace(blocks=()) == model.config.replace(blocks=())
    tokens = torch.randint(0, 61, (2, 9))
    assert_close(scores(again, tokens), scores(model, tokens), rtol=0, atol=0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1


@pytest.mark.parametrize(("labels", "told"), [(3, "3 classes"), (2, "2 classes")])
def test_classifiers_are_refused(labels: int, told: str, tmp_path: Path) -> None:
    save_scorer("llama", tmp_path, labels)
    with pytest.raises(ConfigError, match=f"a LlamaForSequenceClassification of {told}"):
        load_model(tmp_path)


def test_a_language_model_is_none(tmp_path: Path) -> None:
    """Only the class says what the head is."""
    save_scorer("llama", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert not isinstance(read_decoder(tmp_path).head, ScalarHead)
