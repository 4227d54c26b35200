"""e4m3 against all its numbers, its products against those of the dense weight, its refusals."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model
from torch import nn

from treadle.core.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.quantization.float8 import DynamicFloat8, Float8, Float8Weight
from treadle.quantization.int8 import Int8
from treadle.quantization.layers import QuantizedLinear
from treadle.quantization.nf4 import NF4
from treadle.quantization.quantize import Quantization


def numbers() -> list[float]:
    """Every finite number of e4m3, by the format's definition: bias 7, subnormals in 2^-9."""
    positive = [m * 2.0**-9 for m in range(8)]
    positive += [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    return sorted({*positive, *(-x for x in positive)})


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=True)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_codes_are_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 96) * torch.logspace(-6, 3, 6)[:, None]
    weight[2, 5] = 0.0
    packed = Float8().pack(weight)
    assert isinstance(packed, Float8Weight)
    codes = packed.codes.view(torch.float8_e4m3fn).double()
    table = torch.tensor(numbers(), dtype=torch.float64)
    assert table.max() == 448
    scaled = weight.double() / packed.scales.double()
    best = (scaled[..., None] - table).abs().amin(-1)
    found = (scaled - codes).abs()
    # fp32 quotients may fall on the other side of a tie
    torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(codes.abs().amax(1), torch.full((6,), 448.0).double())
    error = (packed.dense(torch.float64) - weight.double()).abs()
    limit = torch.maximum(weight.abs() / 16, packed.scales * 2.0**-10).double()
    assert (error <= limit * (1 + 1e-6)).all()


def test_a_model_that_is_cast_keeps_its_codes() -> None:
    packed = Float8().pack(torch.randn(32, 32))
    before = packed.dense(torch.float32)
    packed.to(torch.bfloat16)
    torch.testing.assert_close(packed.dense(torch.float32), before, atol=0, rtol=2**-8)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert DynamicFloat8().forward(x, packed).isfinite().all()


def test_rows_and_zeros() -> None:
    weight = torch.randn(5, 16)
    weight[3] = 0.0
    packed = Float8().pack(weight)
    ids = torch.tensor([3, 1, 1])
    assert torch.equal(packed.rows(ids, torch.float32), packed.dense(torch.float32)[ids])
    assert not packed.dense(torch.float32)[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients(dtype: torch.dtype) -> None:
    """Dequantised: exact. With rounded activations: within what rounding a token can do."""
    torch.manual_seed(1)
    layer = linear(torch.randn(32, 48))
    packed = Float8Weight(layer.weight.detach())
    x = torch.randn(7, 48, dtype=dtype) * torch.logspace(-2, 2, 7, dtype=dtype)[:, None]
    x.requires_grad_()
    dense = packed.dense(torch.float64)
    exact = x.double() @ dense.T
    bound = x.detach().double().abs() @ dense.abs().T
    for kernel, error in ((Float8().kernel, 2**-7), (DynamicFloat8(), 2**-4 + 2**-7)):
        kernel.check(packed)
        y = QuantizedLinear(packed, None, kernel)(x)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= error * bound).all()
        g = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(
            found.double(),
            g.double() @ dense,
            atol=0.3 if dtype is torch.bfloat16 else 1e-4,
            rtol=0.02,
        )


def divergence(model: DecoderModel, quantization: Quantization) -> float:
    """How far a model's predictions go from what they were, in nats; it is quantised in place."""
    text = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.logits(model(text)).log_softmax(-1)
        quantization(model)
        after = model.logits(model(text)).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_model_in_fp8_says_almost_the_same() -> None:
    """Four significant bits are worse than the eight of int8 and better than the levels of NF4."""
    model = tiny_model()
    found = divergence(model, Float8())
    assert divergence(tiny_model(), Int8()) < found < divergence(tiny_model(), NF4()) / 4
    packed = [m for m in model.modules() if isinstance(m, Float8Weight)]
    assert len(packed) == 14
    request = Request((1, 2, 3), Sampling(temperature=0.0, max_tokens=6))
    ((answer,),) = Engine(model, byte_tokenizer(), EngineConfig(slots=1)).generate([request])
    assert len(answer.tokens) == 6


def test_what_cannot_be_multiplied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = DynamicFloat8()
    with pytest.raises(ConfigError, match="in e4m3; take Float8"):
        kernel.check(Int8().pack(torch.randn(16, 16)))
    with pytest.raises(
        ConfigError, match=r"multiples of 16, and the weight is 16 x 24; .*Dequantise"
    ):
        kernel.check(Float8().pack(torch.randn(16, 24)))
    kernel.check(Float8().pack(torch.randn(16, 16)).to("meta"))  # a model that is only laid out
    monkeypatch.setattr(Float8Weight, "device", torch.device("xpu"))
    with pytest.raises(ConfigError, match=r"no fp8 on xpu; take kernel=Dequantise"):
        kernel.check(Float8().pack(torch.randn(16, 16)))


def test_a_chip_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Float8().pack(torch.randn(16, 16))
    monkeypatch.setattr(Float8Weight, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce RTX 3090")
    with pytest.raises(ConfigError, match=r"GeForce RTX 3090 multiplies no fp8; take kernel=Deq"):
        DynamicFloat8().check(packed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    DynamicFloat8().check(packed)
