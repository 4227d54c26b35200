"""What all adapters of low rank share: the largest rank, and inputs of any number of axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.peft.adalora import AdaLoRA
from treadle.peft.adapter import Adapter, LinearAdapter
from treadle.peft.dora import DoRA
from treadle.peft.lora import LoRA
from treadle.peft.low_rank import check_rank

KINDS = (LoRA(rank=2), DoRA(rank=2), AdaLoRA(rank=2))


def test_a_rank_may_be_that_of_the_matrix_and_no_more() -> None:
    check_rank("LoRA", 4, "q", (4, 8))
    check_rank("LoRA", 4, "q", (8, 4))
    for shape in ((4, 8), (8, 4)):
        with pytest.raises(ConfigError, match=r"rank 5 is larger than `q`.*choose at most 4"):
            check_rank("LoRA", 5, "q", shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_any_number_of_axes(kind: Adapter) -> None:
    torch.manual_seed(0)
    layer = kind.wrap("q", nn.Linear(6, 5))
    assert isinstance(layer, LinearAdapter)
    with torch.no_grad():
        for parameter in layer.trained():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 3, 4, 6)
    expected = x @ layer.adapted_weight().T + layer.base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x[0, 0, 0]), expected[0, 0, 0], rtol=1e-4, atol=1e-4)
