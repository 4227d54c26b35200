"""Adapter folders: PEFT opens ours, we open PEFT's, and what does not belong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel, swap
from treadle.models.families import family_for_hf
from treadle.models.hub.fill import applicable, spill
from treadle.models.llama import tiny_llama
from treadle.nn.ffn.ffn import MLP, GatedMLP
from treadle.peft.adapter import adapted, freeze
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.lora import LoRA
from treadle.peft.low_rank import RankStabilised

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny(*, seed: int = 0, layers: int = 2, dim: int = 32, ffn: int = 48) -> DecoderModel:
    torch.manual_seed(seed)
    model = tiny_llama(32, dim=dim, layers=layers, heads=4, kv_heads=2, hidden=ffn).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def perturbed(model: DecoderModel) -> DecoderModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: DecoderModel) -> Tensor:
    return model.logits(model(TOKENS)).detach()


def transformers_of(model: DecoderModel) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    family = family_for_hf(model.config).huggingface
    theirs = LlamaForCausalLM(LlamaConfig(**family.write(model.config)))
    rules = applicable(model, family.rules(model.config))
    theirs.load_state_dict(dict(spill(model, rules)), strict=False)
    return theirs.eval()


@pytest.mark.parametrize("targets", [("q", "down"), ("embedding", "v"), ("blocks.1.mixer.q", "up")])
def test_peft_opens_what_treadle_saved(tmp_path: Path, targets: tuple[str, ...]) -> None:
    from peft import PeftModel

    theirs = transformers_of(tiny())
    model = perturbed(LoRA(rank=4, alpha=12, targets=targets, scaling=RankStabilised())(tiny()))
    save_adapter(model, tmp_path / "adapter", base="tiny")
    opened = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(opened(TOKENS).logits, logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(tiny()) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "down_proj"], ["embed_tokens", "v_proj"], ["layers.1.self_attn.q_proj", "up_proj"]],
)
def test_treadle_opens_what_peft_saved(tmp_path: Path, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(transformers_of(tiny()), config)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny(), tmp_path).eval()
    torch.testing.assert_close(logits(model), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert (logits(tiny()) - logits(model)).abs().max() > 0.1
    config_ours = next(iter(adapted(model).values())).config
    assert config_ours.rank == 4
    assert config_ours.alpha == 12


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = perturbed(LoRA(rank=3, dropout=0.1, targets=("q", "gate", "embedding"))(tiny()))
    save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny(), tmp_path / "a")
    assert torch.equal(logits(model.eval()), logits(again.eval()))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    ours = next(iter(adapted(again).values())).config
    assert isinstance(ours, LoRA)
    assert set(ours.targets) == {"q", "gate", "embedding"}
    assert ours.dropout == 0.1
    save_adapter(again, tmp_path / "a")  # a folder that is there is replaced


def test_only_the_adapter_is_saved(tmp_path: Path) -> None:
    save_adapter(LoRA(rank=2, targets=("q",))(tiny()), tmp_path / "a")
    shapes = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "a/adapter_model.safetensors").items()
    }
    front = "base_model.model.model.layers"
    assert shapes == {
        f"{front}.{i}.self_attn.q_proj.lora_{part}.weight": shape
        for i in range(2)
        for part, shape in (("A", (2, 32)), ("B", (32, 2)))
    }


def test_loads_onto_a_rounded_base(tmp_path: Path) -> None:
    save_adapter(perturbed(LoRA(rank=4)(tiny())), tmp_path)
    model = load_adapter(tiny().bfloat16(), tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_decoder_of_no_family_keeps_its_own_names(tmp_path: Path) -> None:
    def odd() -> DecoderModel:
        torch.manual_seed(0)
        plain = swap(tiny().config.blocks[1], GatedMLP, lambda f: MLP(hidden=f.hidden))
        config = tiny().config
        return config.replace(blocks=(config.blocks[0], plain)).build()

    model = perturbed(LoRA(rank=2, targets=("q", "down"))(odd()))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(odd(), tmp_path)), logits(model))


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without_one(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if "layers.1.self_attn.q_proj.lora_B" in n))
    save_file(tensors, file)


def _without_probe(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file)


def _with_header(value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata={"treadle_base": json.dumps(value)})

    return change


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "other", "message"),
    [
        (_nothing, {"seed": 1}, "trained on another base.*differ"),
        (
            _nothing,
            {"dim": 64},
            r"q_proj.lora_A.weight is \(4, 32\), but here it must be \(4, 64\)",
        ),
        (_nothing, {"layers": 1}, "`base_model.model.model.layers.1.*has no place.*base small"),
        (_without_probe, {"layers": 3}, "no weights for 2 of the layers.*layers.2.*base small"),
        (_without_one, {}, r"q_proj has \['lora_A.weight'\], but needs"),
        (_cut, {}, "broken"),
        (_with_header([1]), {}, "broken: its header"),
        (_with_header({"module": "model.layers.0.self_attn.q_proj"}), {}, "broken: its header"),
        (_with_header({"module": "x", "values": [0.0] * 64}), {}, "broken: its header"),
        (_with_header({"module": "x", "values": [0.0, 1.0]}), {}, "broken: its header"),
        (_pickle, {}, "a pickle .* is never loaded"),
        (lambda f: (f / "adapter_config.json").write_text("{"), {}, "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), {}, "expected an object"),
        (lambda f: (f / "adapter_config.json").unlink(), {}, "no adapter_config.json"),
        (
            lambda f: _rewrite(f, lambda c: c.update(peft_type="LOHA")),
            {},
            "unknown peft_type 'LOHA'",
        ),
        (lambda f: _rewrite(f, lambda c: c.update(use_qalora=True)), {}, "use_qalora=True"),
        (lambda f: _rewrite(f, lambda c: c.update(bias="all")), {}, "bias='all'"),
        (lambda f: _rewrite(f, lambda c: c.update(r=None)), {}, "r=None"),
        (lambda f: _rewrite(f, lambda c: c.update(r=2)), {}, r"is \(4, 32\).*must be \(2, 32\)"),
    ],
)
def test_what_does_not_belong_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], other: dict[str, int], message: str
) -> None:
    save_adapter(perturbed(LoRA(rank=4, targets=("q", "v"))(tiny())), tmp_path, base="small")
    spoil(tmp_path)
    model = tiny(**other)
    before = logits(model)
    with pytest.raises(TreadleError, match=message):
        load_adapter(model, tmp_path)
    assert not adapted(model)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    """A second adapter that does not fit leaves the first one where it is, in training."""
    save_adapter(perturbed(LoRA(rank=4, targets=("q",))(tiny(seed=1))), tmp_path)
    model = perturbed(LoRA(rank=2, targets=("up",))(tiny()))
    before, names = logits(model), set(adapted(model))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(TreadleError, match="trained on another base"):
        load_adapter(model, tmp_path)
    assert set(adapted(model)) == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(logits(model), before)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="no adapters to save"):
        save_adapter(tiny(), tmp_path)
    model = LoRA(rank=2, targets=("q",))(LoRA(rank=4, targets=("up",))(tiny()))
    with pytest.raises(TreadleError, match="different configurations"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_header_keeps_the_probe(tmp_path: Path) -> None:
    model = LoRA(rank=2, targets=("up",))(tiny())
    freeze(model)
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as handle:
        probe = json.loads(handle.metadata()["treadle_base"])
    layer = model.get_submodule("blocks.0.ffn.up")
    assert isinstance(layer.base, nn.Linear)
    assert probe["module"] == "model.layers.0.mlp.up_proj"
    assert set(probe["values"]) <= set(layer.base.weight.flatten().tolist())
