"""LoRA on the experts of a mixture against PEFT's `target_parameters`, on Mixtral and Qwen 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.hf_zoo import save
from peft_pair import perturbed, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.core.errors import ConfigError, FileFormatError
from treadle.inference.adapters import Adapters, CannotShareError
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.nn.ffn.moe import Experts
from treadle.peft.adapter import adapted, disabled, merge, remove
from treadle.peft.dora import DoRA
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.lora import LoRA
from treadle.peft.lora_experts import LoRAExperts
from treadle.peft.low_rank import RankStabilised

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
BOTH = LoRA(rank=3, alpha=12, targets=("q", "experts"), scaling=RankStabilised())


@pytest.fixture(params=["mixtral", "qwen3-moe-mixed"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(family: str, folder: Path) -> tuple[Any, DecoderModel]:
    theirs = save(family, folder / "base")
    return theirs, load_model(folder / "base").model


def logits(model: DecoderModel) -> Tensor:
    return model.logits(model(TOKENS))


def gradients(model: Any) -> None:
    """Gradients in the place of weights: both can name those."""
    for parameter in trained(model).values():
        assert parameter.grad is not None
        parameter.data = parameter.grad


def test_matches_peft(family: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    base, model = pair(family, tmp_path)
    plain = logits(model).detach()
    model = perturbed(BOTH(model)).eval()
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True).eval()
    found, expected = logits(model), theirs(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1

    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(load_model(tmp_path / "base").model, tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(again), found, rtol=1e-4, atol=1e-4)

    weight = torch.randn(expected.shape)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients(model)
    gradients(theirs)
    save_adapter(model, tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    right = get_peft_model_state_dict(theirs)
    assert set(ours) == set(right)
    assert sum("experts" in name for name in ours) == 4 * sum(
        isinstance(layer, LoRAExperts) for layer in adapted(model).values()
    )
    for name, gradient in right.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_reads_what_peft_trained(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, model = pair(family, tmp_path)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    theirs = get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(model), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert {type(layer) for layer in adapted(model).values()} == {LoRAExperts}


def test_start_equals_base_and_merged_equals_adapted(tmp_path: Path) -> None:
    _, model = pair("mixtral", tmp_path)
    plain = logits(model).detach()
    LoRA(rank=2, targets=("experts",))(model)
    assert torch.equal(logits(model), plain)
    assert set(trained(model)) == {
        f"blocks.{i}.ffn.experts.{part}.{factor}"
        for i in range(3)
        for part in ("gate_up", "down")
        for factor in ("A", "B")
    }
    for name, factor in trained(model).items():
        inputs = factor.shape[-1]
        if name.endswith("A"):  # as in a linear layer of an expert
            assert factor.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.05)
    perturbed(model)
    changed = logits(model).detach()
    assert (changed - plain).abs().max() > 0.1
    with disabled(model):
        assert torch.equal(logits(model), plain)
    layers = adapted(model)
    merge(model)
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    assert not adapted(model)
    kept = layers["blocks.0.ffn.experts"].base
    assert isinstance(kept, Experts)
    assert not torch.equal(kept.gate, model.get_parameter("blocks.0.ffn.experts.gate"))


def test_an_expert_without_tokens_is_left_alone(tmp_path: Path) -> None:
    _, model = pair("mixtral", tmp_path)
    LoRA(rank=2, targets=("blocks.0.ffn.experts",))(model)
    layer = perturbed(model).get_submodule("blocks.0.ffn.experts")
    assert isinstance(layer, LoRAExperts)
    x = torch.randn(5, 24)
    counts = torch.tensor([3, 0, 2, 0, 0])
    layer(x, counts).sum().backward()
    for factors in (layer.gate_up, layer.down):
        assert factors.A.grad is not None
        assert factors.B.grad is not None
        moved = factors.A.grad.abs().amax((1, 2)) > 0
        assert moved.tolist() == [True, False, True, False, False]
        assert (factors.B.grad.abs().amax((0, 1)) > 0).tolist() == moved.tolist()


def test_the_engine_refuses_to_share_a_batch(tmp_path: Path) -> None:
    _, model = pair("mixtral", tmp_path)
    save_adapter(perturbed(BOTH(model)), tmp_path / "a")
    remove(model)
    served = Adapters(model, slots=2)
    with pytest.raises(CannotShareError, match=r"LoRA on `blocks\.0\.ffn\.experts` cannot share"):
        served.load("a", tmp_path / "a")
    assert not adapted(model)


def test_mistakes_are_named(tmp_path: Path) -> None:
    _, model = pair("mixtral", tmp_path)
    before = logits(model)
    for config, message in (
        (LoRA(rank=25, targets=("experts",)), "rank 25 is larger than `blocks.0.ffn.experts.gate`"),
        (LoRA(dropout=0.1, rank=2, targets=("experts",)), "set dropout=0"),
        (DoRA(rank=2, targets=("experts",)), "target `experts` matches no layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(model)
    save_adapter(perturbed(BOTH(model)), tmp_path / "a")
    remove(model)
    file = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(file.read_text())
    whole = fields["target_parameters"]
    fields["target_parameters"] = [name for name in whole if name.endswith("down_proj")]
    file.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="experts' down_proj alone"):
        load_adapter(model, tmp_path / "a")
    file.write_text(json.dumps(fields | {"target_parameters": whole}))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(weights).items() if "experts.base_layer" not in n}
    save_file(tensors, weights)
    with pytest.raises(FileFormatError, match=r"but needs.*base_layer\.lora_A"):
        load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), before)
