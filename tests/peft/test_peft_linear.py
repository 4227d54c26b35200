"""What holds of every adapter on a linear layer: inputs of any shape, bases of any dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.peft.adalora import AdaLoRA
from treadle.peft.adapter import Adapter, LinearAdapter
from treadle.peft.bitfit import BitFit
from treadle.peft.dora import DoRA
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA
from treadle.peft.low_rank import LowRank, check_rank
from treadle.peft.sparse import SparseDelta

LOW_RANK = (LoRA(rank=2), DoRA(rank=2), AdaLoRA(rank=2))
KINDS = (
    *LOW_RANK,
    IA3(targets=("q",), inputs=()),
    IA3(targets=("q",), inputs=("q",)),
    BitFit(),
    SparseDelta(density=0.5),
)


def changed(kind: Adapter, base: nn.Linear) -> LinearAdapter:
    torch.manual_seed(1)
    layer = kind.wrap("q", base)
    assert isinstance(layer, LinearAdapter)
    with torch.no_grad():
        for parameter in layer.trained():
            parameter.add_(torch.randn_like(parameter))
    return layer


def test_a_rank_may_be_that_of_the_matrix_and_no_more() -> None:
    check_rank("LoRA", 4, "q", (4, 8))
    check_rank("LoRA", 4, "q", (8, 4))
    for shape in ((4, 8), (8, 4)):
        with pytest.raises(ConfigError, match=r"rank 5 is larger than `q`.*choose at most 4"):
            check_rank("LoRA", 5, "q", shape)


@pytest.mark.parametrize("kind", LOW_RANK, ids=lambda kind: type(kind).__name__)
def test_each_refuses_a_rank_above_its_matrix(kind: LowRank | AdaLoRA) -> None:
    owner = type(kind).__name__
    kind.replace(rank=5).wrap("q", nn.Linear(6, 5))
    with pytest.raises(ConfigError, match=f"{owner}: rank 6 is larger than `q`.*at most 5"):
        kind.replace(rank=6).wrap("q", nn.Linear(6, 5))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_any_number_of_axes(kind: Adapter) -> None:
    layer = changed(kind, nn.Linear(6, 5))
    x = torch.randn(2, 3, 4, 6)
    plain = layer.merged()
    expected = x @ plain.weight.T + plain.bias
    assert not torch.allclose(expected, layer.base(x), atol=0.1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x[0, 0, 0]), expected[0, 0, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.effective_weight(), plain.weight)
    assert torch.equal(layer.effective_bias(), plain.bias)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.effective_weight(), layer.base.weight)
    assert torch.equal(layer.effective_bias(), layer.base.bias)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_what_trains_is_fp32_and_only_the_sum_is_rounded(kind: Adapter) -> None:
    base = nn.Linear(6, 5).bfloat16()
    layer, exact = changed(kind, base), changed(kind, copy.deepcopy(base).float())
    assert {parameter.dtype for parameter in layer.trained()} == {torch.float32}
    plain, whole = layer.merged(), exact.merged()
    assert torch.equal(plain.weight, whole.weight.bfloat16())
    assert torch.equal(plain.bias, whole.bias.bfloat16())
    x = torch.randn(3, 6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), exact(x), rtol=0.03, atol=0.1)


@pytest.mark.parametrize("kind", LOW_RANK, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True in a LoRA adapter is not known"),
        ({"bias": "all"}, "bias='all' in a LoRA adapter changes the base"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' in a LoRA adapter changes"),
        ({"target_parameters": ["a.b.down_proj"]}, "experts' down_proj alone"),
    ],
)
def test_settings_of_peft_that_change_the_base_are_refused(
    kind: LowRank | AdaLoRA, setting: dict[str, Any], message: str
) -> None:
    fields = {**kind.to_peft(), "target_parameters": ["a.b.down_proj", "a.b.gate_up_proj"]}
    assert type(kind).from_peft(fields, kind.targets) == kind
    with pytest.raises(ConfigError, match=message):
        type(kind).from_peft({**fields, **setting}, kind.targets)
