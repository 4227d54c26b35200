"""Quantised models: what shrinks, what is shared, adapters on top, a real perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.models.decoder import DecoderModel
from treadle.models.llama import tiny_llama
from treadle.nn.linear import weight_of
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.lora import LoRA
from treadle.quantization.blocks import Blocks
from treadle.quantization.int4 import Int4
from treadle.quantization.int8 import Int8
from treadle.quantization.layers import QuantizedEmbedding, QuantizedLinear
from treadle.quantization.quantize import Quantization, Symmetric, unpack

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
EVERYTHING = ("blocks.*", "embedding", "head")
FORMS = [Int8(), Int4(), Int4(rounding=Symmetric()), Blocks(), Blocks(format="Q8_0")]


def tiny(dim: int = 64, hidden: int = 128, vocab: int = 96) -> DecoderModel:
    torch.manual_seed(0)
    model = tiny_llama(vocab, dim=dim, layers=2, heads=4, kv_heads=2, hidden=hidden).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return model


def logits(model: DecoderModel) -> Tensor:
    return model.logits(model(TOKENS))


def resident(module: nn.Module) -> int:
    """Bytes of every tensor that a module holds, each once, wherever it is kept."""
    tensors = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for part in module.modules()
        for value in (*vars(part).values(), *part._parameters.values(), *part._buffers.values())
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_logits_are_those_of_the_dense_weights(form: Quantization) -> None:
    """A quantised model equals a plain one whose weights were replaced by what was stored."""
    model = form.replace(targets=EVERYTHING)(tiny())
    plain = tiny()
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(weight_of(model.get_submodule(name)))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unpacked_is_a_plain_model_with_what_was_stored(form: Quantization) -> None:
    packed, plain = (form.replace(targets=EVERYTHING)(tiny()) for _ in range(2))
    plain = unpack(plain)
    assert set(plain.state_dict()) == set(tiny().state_dict())
    assert plain.head.weight is plain.embedding.weight
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(layer.weight, weight_of(packed.get_submodule(name)))


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (Int8(), 8 + 16 / 1024),
        (Int8(group=32), 8.5),
        (Int4(rounding=Symmetric()), 4.5),
        (Int4(), 5.0),
        (Int4(group=128), 4.25),
        (Blocks(), 4.5),
        (Blocks(format="Q6_K"), 6.5625),
    ],
    ids=str,
)
def test_resident_weights_shrink(form: Quantization, bits: float) -> None:
    layer = form.replace(targets=("0",))(nn.Sequential(nn.Linear(1024, 256, bias=False)))[0]
    weights = 1024 * 256
    layer(torch.randn(200, 1024, requires_grad=True)).sum().backward()
    assert resident(layer) == sum(t.nbytes for t in layer.state_dict().values())
    assert 8 * resident(layer) / weights == pytest.approx(bits)


def test_default_targets_are_the_linears_of_the_blocks() -> None:
    model = Int8()(tiny())
    kinds = {n: type(m) for n, m in model.named_modules()}
    assert sum(kind is QuantizedLinear for kind in kinds.values()) == 14
    assert kinds["embedding"] is nn.Embedding
    assert kinds["head"] is nn.Linear
    assert model.head.weight is model.embedding.weight


def test_a_tied_table_is_packed_once() -> None:
    model = Int4(targets=EVERYTHING)(tiny())
    assert isinstance(model.embedding, QuantizedEmbedding)
    assert isinstance(model.head, QuantizedLinear)
    assert model.embedding.weight is model.head.weight
    assert model.embedding(TOKENS).shape == (1, 8, 64)
    assert resident(model) < 0.2 * resident(tiny())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_state_dict_restores_the_model(form: Quantization, tmp_path: Path) -> None:
    model = form.replace(targets=EVERYTHING)(tiny())
    torch.manual_seed(1)
    other = form.replace(targets=EVERYTHING)(
        tiny_llama(96, dim=64, layers=2, heads=4, kv_heads=2, hidden=128).build()
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_block_layers_hold_the_bytes_of_the_file(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 24)
    weight = linear.weight.detach().clone()
    layer = Blocks(format=name, targets=("0",))(nn.Sequential(linear))[0]
    data = quantise(weight, FORMATS[name])
    assert torch.equal(layer.weight.blocks, data)
    x = torch.randn(5, 256, requires_grad=True)
    dense = dequantise(data, FORMATS[name])
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, -1))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("first", ["base", "adapter"])
def test_adapters_on_a_quantised_base(form: Quantization, first: str, tmp_path: Path) -> None:
    """Whichever comes first; gradients are those of the dense base; merged equals adapted."""
    lora = LoRA(rank=4, targets=("q", "down"))
    if first == "base":
        model = lora(form(tiny()))
    else:
        model = form(lora(tiny()))
    start = logits(model).detach()
    torch.testing.assert_close(start, logits(form(tiny())), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    out = logits(model)
    out.square().sum().backward()

    plain = form(tiny())
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight.data.copy_(weight_of(layer))
            plain.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], dense)
    reference = lora(plain)
    for name, layer in adapted(reference).items():
        for leaf, tensor in layer.peft_tensors().items():
            tensor.data.copy_(adapted(model)[name].peft_tensors()[leaf])
    logits(reference).square().sum().backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-3)

    with disabled(model):
        torch.testing.assert_close(logits(model), start)
    save_adapter(model, tmp_path)
    again = load_adapter(form(tiny()), tmp_path)
    torch.testing.assert_close(logits(again), out)
    torch.testing.assert_close(logits(merge(model)), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [Int8(), Int4(), Blocks()], ids=str)
def test_twice_or_nowhere_is_an_error(form: Quantization) -> None:
    with pytest.raises(ConfigError, match=r"`blocks\.\*` matches no layer"):
        form(form(tiny()))
    with pytest.raises(ConfigError, match="`qq` matches no layer"):
        form.replace(targets=("qq",))(tiny())


def test_blocks_that_do_not_divide_name_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"Blocks of `blocks.0.mixer.q`: rows of 64.*Q4_K"):
        Blocks(format="Q4_K")(tiny())


def _perplexity(model: DecoderModel, ids: Tensor) -> float:
    total = 0.0
    with torch.inference_mode():
        for row in ids:
            z = model.logits(model(row[:-1])).float()
            total += float(F.cross_entropy(z, row[1:], reduction="sum"))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))
