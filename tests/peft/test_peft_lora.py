"""LoRA beside PEFT on one tiny Llama, and what must hold of any adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, DecoderModel, LinearHead
from treadle.models.llama import tiny_llama
from treadle.peft.adapter import adapted, disabled, merge, merged, remove, unmerge
from treadle.peft.lora import LoRA, LoRAEmbedding, LoRALinear
from treadle.peft.low_rank import Gaussian, RankStabilised

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def tiny(**changes: object) -> DecoderModel:
    torch.manual_seed(0)
    config: Decoder = tiny_llama(32, dim=32, layers=2, heads=4, kv_heads=2, hidden=48)
    model = config.replace(**changes).build()
    with torch.no_grad():  # larger than fresh weights, so that every part shows in the logits
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def logits(model: DecoderModel) -> Tensor:
    return model.logits(model(TOKENS))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("stabilised", [False, True])
def test_matches_peft(stabilised: bool) -> None:
    """Outputs, and gradients of A and B, equal those of PEFT with the same weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from treadle.models.families import family_for_hf
    from treadle.models.hub.fill import applicable, spill

    model = tiny()
    family = family_for_hf(model.config).huggingface
    theirs = LlamaForCausalLM(LlamaConfig(**family.write(model.config)))
    rules = applicable(model, family.rules(model.config))
    theirs.load_state_dict(dict(spill(model, rules)), strict=False)

    names = {"q": "q_proj", "v": "v_proj", "down": "down_proj", "embedding": "embed_tokens"}
    theirs = get_peft_model(
        theirs,
        LoraConfig(
            r=4, lora_alpha=12, use_rslora=stabilised, target_modules=sorted(names.values())
        ),
    )
    scaling = {"scaling": RankStabilised()} if stabilised else {}
    LoRA(rank=4, alpha=12, targets=tuple(names), **scaling)(model)
    perturb(model)
    pairs = {}
    for name, layer in adapted(model).items():
        path, leaf = name.rpartition(".")[::2]
        path = path.replace("blocks", "model.layers").replace("mixer", "self_attn")
        path = path.replace("ffn", "mlp") or "model"
        for part, tensor in layer.peft_tensors().items():
            front, *rest = part.split(".")
            attribute = ".".join([front, "default", *rest])
            key = f"base_model.model.{path}.{names[leaf]}.{attribute}"
            pairs[key] = (layer, part)
            theirs.get_parameter(key).data.copy_(tensor)
    assert len(pairs) == 2 * len(adapted(model)) == 14

    weights = torch.randn(2, 8, 32)
    ours_out, theirs_out = logits(model), theirs(TOKENS).logits
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-4, atol=1e-4)
    with disabled(model), theirs.disable_adapter():
        torch.testing.assert_close(logits(model), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert (logits(model) - ours_out).abs().max() > 0.1
    (ours_out * weights).sum().backward()
    (theirs_out * weights).sum().backward()
    for key, (layer, part) in pairs.items():
        gradient = theirs.get_parameter(key).grad
        parameter = layer.A if part.endswith(("A", "A.weight")) else layer.B
        ours = parameter.grad.T if part == "lora_embedding_A" else parameter.grad
        assert gradient.abs().max() > 1e-3, key
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-4, msg=key)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)


def test_start_equals_base_and_only_adapters_train() -> None:
    model = tiny()
    before = logits(model)
    LoRA(rank=4, targets=("q", "k", "v", "o", "gate", "up", "down", "embedding"))(model)
    assert torch.equal(logits(model), before)
    assert {n.rpartition(".")[2] for n in trained(model)} == {"A", "B"}
    assert len(trained(model)) == 2 * (2 * 7 + 1)
    logits(model).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_second_adapter_lets_the_first_train() -> None:
    model = LoRA(rank=4, targets=("down",))(LoRA(rank=2, targets=("q",))(tiny()))
    assert len(trained(model)) == 8


def test_formula_in_float64() -> None:
    """y = W x + b + alpha / r B (A x), by loops."""
    linear = nn.Linear(5, 3)
    layer = LoRALinear(linear, LoRA(rank=2, alpha=3.0))
    nn.init.normal_(layer.B)
    x = torch.randn(5)
    w, b, big_a, big_b, v = (
        t.detach().double().tolist() for t in (linear.weight, linear.bias, layer.A, layer.B, x)
    )
    h = [sum(big_a[r][i] * v[i] for i in range(5)) for r in range(2)]
    y = [
        sum(w[o][i] * v[i] for i in range(5)) + b[o] + 1.5 * sum(big_b[o][r] * h[r] for r in (0, 1))
        for o in range(3)
    ]
    torch.testing.assert_close(layer(x), torch.tensor(y))
    assert layer(x.expand(2, 4, 5)).shape == (2, 4, 3)
    torch.testing.assert_close(
        nn.functional.linear(x, layer.effective_weight(), linear.bias), layer(x)
    )


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 3).double(), LoRA(rank=2)).double()
    nn.init.normal_(layer.B)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"A": a, "B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.A, layer.B))


def test_merged_equals_adapted_and_unmerge_is_exact() -> None:
    model = LoRA(rank=4)(tiny())
    perturb(model)
    adapted_logits = logits(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with disabled(model):
        base_logits = logits(model)
    assert not torch.allclose(adapted_logits, base_logits, atol=0.1)

    layers = adapted(model)
    merge(model)
    assert not adapted(model)
    assert set(model.state_dict()) == set(tiny().state_dict())
    torch.testing.assert_close(logits(model), adapted_logits, rtol=1e-4, atol=1e-4)
    unmerge(model, layers)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    with merged(model):
        assert not adapted(model)
    assert torch.equal(logits(model), adapted_logits)
    assert torch.equal(logits(remove(model)), base_logits)


def test_merge_rounds_once_from_fp32() -> None:
    base = nn.Linear(64, 64, bias=False).bfloat16()
    layer = LoRALinear(base, LoRA(rank=4))
    nn.init.normal_(layer.B, std=1e-2)
    exact = base.weight.double() + 8.0 * layer.B.double() @ layer.A.double()
    weight = layer.merged().weight
    assert weight.dtype == torch.bfloat16
    assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()
    assert torch.equal(base.weight, layer.base.weight)


def test_merging_a_plain_model_changes_nothing() -> None:
    model = tiny()
    before = logits(model)
    assert torch.equal(logits(merge(model)), before)


def test_disabled_restores_after_an_error() -> None:
    model = LoRA(rank=4)(tiny())
    perturb(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), disabled(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="no adapters to switch off"), disabled(tiny()):
        pass


def test_head_weight_carries_the_adapter() -> None:
    """Losses that take the head's weight must see what `logits` sees."""
    model = LoRA(rank=4, targets=("head",))(tiny(head=LinearHead()))
    perturb(model)
    hidden = model(TOKENS)
    torch.testing.assert_close(hidden @ model.head_weight().T, model.logits(hidden))
    with disabled(model):
        torch.testing.assert_close(hidden @ model.head_weight().T, model.logits(hidden))


@pytest.mark.parametrize("mode", ["bf16 base", "autocast", "bf16 base, autocast"])
def test_low_precision_base_with_fp32_adapter(mode: str) -> None:
    """The factors stay in fp32; outputs and gradients are those of fp32 within bf16's rounding."""
    exact = LoRA(rank=4)(tiny())
    perturb(exact)
    model = LoRA(rank=4)(tiny())
    with torch.no_grad():
        for ours, theirs in zip(trained(model).values(), trained(exact).values(), strict=True):
            ours.copy_(theirs)
    if "bf16" in mode:
        for name, parameter in model.named_parameters():
            if not name.endswith((".A", ".B")):
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mode):
        out = logits(model)
    reference = logits(exact)
    assert (out - reference).norm() < 0.05 * reference.norm()
    out.float().square().mean().backward()
    reference.square().mean().backward()
    for ours, theirs in zip(trained(model).values(), trained(exact).values(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 0.15 * theirs.grad.norm()


def test_saves_each_input_once_and_no_base_gradient() -> None:
    """Kept for the backward pass: x, A x and the weights; nothing else of the size of x or y."""
    layer = LoRALinear(nn.Linear(64, 48, bias=False).requires_grad_(False), LoRA(rank=2))
    x = torch.randn(100, 64, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    weights = (layer.A, layer.B, layer.base.weight)
    assert sum(saved.values()) <= sum(t.nbytes for t in (x, *weights)) + 100 * 2 * 4
    y.sum().backward()
    assert layer.base.weight.grad is None


def test_dropout_is_on_the_adapter_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 3), LoRA(rank=2, dropout=0.5))
    x = torch.randn(7, 400)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (mean - layer(x)).norm() < 0.1 * (layer(x) - layer.base(x)).norm()


def test_embedding_adapter_equals_its_table() -> None:
    layer = LoRAEmbedding(nn.Embedding(10, 6), LoRA(rank=3))
    nn.init.normal_(layer.A)
    ids = torch.tensor([[1, 2], [9, 1]])
    torch.testing.assert_close(layer(ids), layer.merged()(ids))
    assert torch.equal(layer.weight, layer.merged().weight)
    layer.enabled = False
    assert torch.equal(layer.weight, layer.base.weight)


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 3, stride=2, padding=1), (5, 6, 11)),
    (nn.Conv2d(6, 8, (3, 2), padding=1, bias=False), (5, 6, 9, 8)),
    (nn.Conv3d(6, 8, 1), (5, 6, 3, 4, 2)),
]


@pytest.mark.parametrize(("base", "shape"), CONVOLUTIONS, ids=lambda v: type(v).__name__)
def test_convolutions_match_peft(base: nn.Module, shape: tuple[int, ...]) -> None:
    """Outputs and gradients with the same factors, and the merged weight."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(
        nn.ModuleDict({"conv": copy.deepcopy(base)}),
        LoraConfig(r=4, lora_alpha=12, target_modules=["conv"], init_lora_weights=False),
    )
    conv = theirs.base_model.model["conv"]
    layer = LoRA(rank=4, alpha=12, targets=("0",))(nn.Sequential(copy.deepcopy(base)))[0]
    factors = {f"lora_{p}.weight": getattr(conv, f"lora_{p}")["default"].weight for p in "AB"}
    with torch.no_grad():
        for name, tensor in layer.peft_tensors().items():
            tensor.copy_(factors[name])
    x = torch.randn(shape)
    ours, expected = layer(x), conv(x)
    assert (ours - base(x)).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected.shape)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in (("lora_A.weight", layer.A), ("lora_B.weight", layer.B)):
        torch.testing.assert_close(
            parameter.grad, factors[name].grad.view_as(parameter), rtol=1e-3, atol=1e-3
        )
    before = base.weight.detach().clone()
    torch.testing.assert_close(layer.merged()(x), ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.base.weight, before)


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="`0` convolves in 4 groups"):
        LoRA(rank=2, targets=("0",))(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4)))


def test_uniform_start() -> None:
    """Within 1 / sqrt(n), of n inputs a channel, and out to there."""
    torch.manual_seed(0)
    config = LoRA(rank=8, targets=("0",))
    for base in (nn.Linear(900, 20), nn.Conv1d(300, 20, 3), nn.Conv2d(100, 20, 3)):
        layer = config(nn.Sequential(base))[0]
        assert layer.A.abs().max().item() == pytest.approx(1 / 30, rel=1e-3)
        assert layer.A.std().item() == pytest.approx(1 / 30 / 3**0.5, rel=0.05)
        assert not layer.B.any()


def test_gaussian_start() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(2000, 300), LoRA(rank=8, init=Gaussian()))
    assert float(layer.A.detach().std()) == pytest.approx(1 / 8, rel=0.05)


def _twice(model: DecoderModel) -> None:
    LoRA(rank=2, targets=("q",))(LoRA(rank=2, targets=("q",))(model))


def _inside(model: DecoderModel) -> None:
    LoRA(rank=2, targets=("q.base",))(LoRA(rank=2, targets=("q",))(model))


def _merge_tied(model: DecoderModel) -> None:
    merge(LoRA(rank=2, targets=("head",))(model))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (LoRA(rank=20), r"rank 20 is larger than `blocks.0.mixer.k`, which is 16 x 32.*at most 16"),
        (LoRA(rank=2, targets=("q_proj",)), r"`q_proj` matches no layer"),
        (LoRA(rank=2, targets=("gat",)), r"did you mean `gate`"),
        (_twice, r"`blocks.0.mixer.q` has an adapter already"),
        (_inside, r"has an adapter already"),
        (_merge_tied, r"`head`: its weight is also that of `embedding`"),
    ],
)
def test_mistakes_are_named(act: Callable[[DecoderModel], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act(tiny())


def test_a_failed_adapter_leaves_the_model_alone() -> None:
    model = tiny()
    with pytest.raises(ConfigError):
        LoRA(rank=20)(model)
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LoRA(**fields)
