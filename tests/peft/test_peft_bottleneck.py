"""Bottleneck adapters beside the formulas of their papers, written out with plain tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft_pair import TOKENS, logits, perturbed, tiny, trained
from torch import Tensor, nn

from treadle.core.errors import ConfigError, TreadleError
from treadle.models.decoder import DecoderModel
from treadle.nn.block import BlockLayer
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.adapter import adapted, disabled, merge
from treadle.peft.bottleneck import Bottleneck, BottleneckLayer, DenseProjection, Parallel
from treadle.peft.compacter import Kronecker, KroneckerLayer
from treadle.peft.files import save_adapter
from treadle.peft.lora import LoRA

FORMS = {
    "houlsby": Bottleneck(width=6),
    "pfeiffer": Bottleneck(width=6, targets=("ffn",), activation="gelu"),
    "parallel": Bottleneck(width=6, targets=("ffn",), connection=Parallel(), scale=4.0),
}


def network(layer: BottleneckLayer, h: Tensor, act: object) -> Tensor:
    inner = act(h @ layer.D.weight.T + layer.D.bias)  # type: ignore[operator]
    return inner @ layer.U.weight.T + layer.U.bias


def by_hand(base: DecoderModel, model: DecoderModel, form: str) -> Tensor:
    """The decoder with pre-norm blocks, written out; sublayers are those of the plain model."""
    layout = Layout.rows(*TOKENS.shape)
    context = Packed.of(layout)
    x = base.embedding(TOKENS.flatten())
    for place, block in enumerate(base.blocks):
        assert isinstance(block, BlockLayer)
        added = {n: m for n, m in adapted(model).items() if n.startswith(f"blocks.{place}.")}
        y = block.mixer(block.mixer_norms.before(x), context)
        if form == "houlsby":
            y = y + network(added[f"blocks.{place}.mixer"], y, F.relu)
        x = x + y
        normed = block.ffn_norms.before(x)
        y = block.ffn(normed)
        ffn = added[f"blocks.{place}.ffn"]
        if form == "parallel":
            y = y + 4.0 * network(ffn, normed, F.relu)
        else:
            y = y + network(ffn, y, F.relu if form == "houlsby" else F.gelu)
        x = x + y
    return base.logits(base.norm(x)).unflatten(0, TOKENS.shape)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_match_the_papers(form: str) -> None:
    """Logits, and gradients of everything that trains."""
    model = perturbed(FORMS[form](tiny()), size=0.3)
    out = logits(model)
    expected = by_hand(tiny(), model, form)
    assert (out - logits(tiny())).abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(out.shape)
    parameters = list(trained(model).values())
    assert len(parameters) == 4 * len(adapted(model)) == 4 * (4 if form == "houlsby" else 2)
    ours = torch.autograd.grad((out * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_start_equals_base_and_it_can_be_switched_off() -> None:
    base = logits(tiny())
    for form in (*FORMS.values(), Bottleneck(width=8, projection=Kronecker())):
        model = form(tiny())
        out = logits(model)
        assert torch.equal(out, base)
        out.square().sum().backward()
        for layer in adapted(model).values():  # D sends something on, so that U begins to learn
            assert max(float(p.grad.abs().max()) for p in layer.U.parameters()) > 0
        perturbed(model)
        assert not torch.allclose(logits(model), base, atol=1e-2)
        with disabled(model):
            assert torch.equal(logits(model), base)


def test_kronecker_matches_the_written_matrix() -> None:
    """sum_i A_i (x) S_i T_i in float64, outputs and gradients."""
    torch.manual_seed(0)
    layer = KroneckerLayer(Kronecker(parts=4, rank=2), 12, 20, zero=False).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    matrix = sum(torch.kron(layer.A[i], layer.S[i] @ layer.T[i]) for i in range(4))
    assert isinstance(matrix, Tensor)
    expected = x @ matrix + layer.bias
    torch.testing.assert_close(layer(x), expected)
    weight = torch.randn_like(expected)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad((layer(x) * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_fresh_factors_are_glorots_one_by_one() -> None:
    """A of variance 1 / n^2; each S_i [in/n, r] and T_i [r, out/n] as Glorot, 2 / (rows + columns);
    biases zero; T zero where zeros are wanted."""
    torch.manual_seed(0)
    layer = KroneckerLayer(Kronecker(parts=8, rank=4), 800, 400, zero=False)
    deviations = {"A": 1 / 8, "S": (2 / (100 + 4)) ** 0.5, "T": (2 / (4 + 50)) ** 0.5}
    for name, expected in deviations.items():
        assert getattr(layer, name).std().item() == pytest.approx(expected, rel=0.1)
    assert not layer.bias.any()
    zero = KroneckerLayer(Kronecker(parts=8, rank=4), 800, 400, zero=True)
    assert not zero.T.any()
    assert zero.S.std().item() == pytest.approx(deviations["S"], rel=0.1)
    assert not DenseProjection().build(4, 3, zero=False).bias.any()


def test_compacter_shares_one_set_of_small_matrices() -> None:
    model = Bottleneck(width=8, projection=Kronecker())(tiny())
    layers = [m for m in model.modules() if isinstance(m, KroneckerLayer)]
    assert len(layers) == 8
    assert len({id(m.A) for m in layers}) == 1
    dense = sum(p.numel() for p in trained(Bottleneck(width=8)(tiny())).values())
    assert sum(p.numel() for p in trained(model).values()) < dense / 3


def test_lora_goes_inside_and_outside() -> None:
    first = Bottleneck(width=4)(LoRA(rank=2, targets=("o", "down"))(tiny()))
    second = LoRA(rank=2, targets=("o", "down"))(Bottleneck(width=4)(tiny()))
    for model in (first, second):
        assert len(trained(model)) == 16 + 8
        logits(perturbed(model)).sum().backward()
        assert all(p.grad is not None for p in trained(model).values())


def test_mistakes_are_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="width 64 is larger than the residual stream of"):
        Bottleneck(width=64)(tiny())
    Bottleneck(width=32)(tiny())  # as wide as the stream, and no wider
    with pytest.raises(ConfigError, match="width 33 is larger"):
        Bottleneck(width=33)(tiny())
    with pytest.raises(ConfigError, match=r"target `attention` matches no layer"):
        Bottleneck(targets=("attention",))(tiny())
    with pytest.raises(ConfigError, match=r"`blocks.0.mixer.q` is no sublayer"):
        Bottleneck(targets=("q",))(tiny())
    with pytest.raises(ConfigError, match=r"parts=5 must divide"):
        Bottleneck(width=10, projection=Kronecker(parts=5))(tiny())
    with pytest.raises(ConfigError, match="not linear and cannot be merged"):
        merge(Bottleneck(width=4)(tiny()))
    with pytest.raises(TreadleError, match="PEFT has no bottleneck adapters"):
        save_adapter(Bottleneck(width=4)(tiny()), str(tmp_path))
