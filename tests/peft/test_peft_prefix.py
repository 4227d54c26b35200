"""Learned prefixes beside PEFT, in packed batches, behind a cache, and in folders both ways."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deaf import Deaf
from peft_pair import TOKENS, logits, tiny, trained, transformers_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treadle.core.errors import ConfigError, TreadleError
from treadle.kernels.attention import AttentionRule, attention, attention_mask
from treadle.models.decoder import DecoderModel
from treadle.models.gpt2 import gpt2
from treadle.models.transform import Transform
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout
from treadle.peft.files import save_adapter
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning, prefix_of
from treadle.peft.prefix_files import load_prefix, save_prefix
from treadle.peft.prompt import PromptTuning
from treadle.peft.virtual import LSTMNetwork, ReLUNetwork, TanhNetwork
from treadle.train.recompute import Recompute

KINDS = [PrefixTuning(tokens=5), PromptTuning(tokens=5)]


def compare(model: DecoderModel, theirs: Any, grads: list[tuple[Tensor, Tensor]]) -> None:
    """Logits, then the gradients of pairs of parameters."""
    ours = logits(model)
    expected = theirs(TOKENS).logits[:, -8:]  # theirs shows virtual tokens too
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours - logits(tiny())).abs().max() > 0.1
    weight = torch.randn(expected.shape)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in grads:
        assert other.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad.view_as(other), other.grad, rtol=1e-3, atol=1e-3)


def opened(folder: Path) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_of(tiny()), folder)
    for parameter in model.prompt_encoder.parameters():  # which PEFT would only run
        parameter.requires_grad_(True)
    return model


def test_prefix_matches_peft(tmp_path: Path) -> None:
    model = PrefixTuning(tokens=5)(tiny())
    save_prefix(model, tmp_path / "ours")
    theirs = opened(tmp_path / "ours")
    (table,) = trained(model).values()
    compare(model, theirs, [(table, theirs.prompt_encoder.default.embedding.weight)])
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("theirs", "ours"):
        again = load_prefix(tiny(), tmp_path / folder)
        torch.testing.assert_close(logits(again), logits(model))


def test_prompts_match_peft(tmp_path: Path) -> None:
    model = PromptTuning(tokens=5)(tiny())
    save_prefix(model, tmp_path / "ours")
    theirs = opened(tmp_path / "ours")
    (table,) = trained(model).values()
    compare(model, theirs, [(table, theirs.prompt_encoder.default.embedding.weight)])
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("theirs", "ours"):
        again = load_prefix(tiny(), tmp_path / folder)
        torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("ours", "name"), [(ReLUNetwork(hidden=12), "MLP"), (LSTMNetwork(hidden=12), "LSTM")]
)
def test_p_tuning_matches_peft(tmp_path: Path, ours: Any, name: str) -> None:
    from peft import PromptEncoderConfig, get_peft_model

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=12,
        encoder_reparameterization_type=name,
        encoder_dropout=0.0,
    )
    theirs = get_peft_model(transformers_of(tiny()), config)
    model = PromptTuning(tokens=5, encoder=ours)(tiny())
    others = [p for p in theirs.prompt_encoder.parameters() if p.requires_grad]
    mine = list(trained(model).values())
    if name == "LSTM":  # theirs names the recurrent part first, as ours does
        assert len(mine) == len(others) == 1 + 16 + 4
    with torch.no_grad():
        for a, b in zip(mine, others, strict=True):
            b.mul_(4)  # so that the prompt is as large as embeddings are
            a.copy_(b)
    compare(model, theirs, list(zip(mine, others, strict=True)))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_prefix(tiny(), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_prefix_network_matches_peft(tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=12,
        prefix_projection=True,
        token_dim=16,
        num_attention_heads=2,
        num_layers=2,
    )
    theirs = get_peft_model(transformers_of(tiny()), config)
    model = PrefixTuning(tokens=5, encoder=TanhNetwork(hidden=12))(tiny())
    others = [p for p in theirs.prompt_encoder.parameters() if p.requires_grad]
    with torch.no_grad():
        for a, b in zip(trained(model).values(), others, strict=True):
            b.mul_(4)
            a.copy_(b)
    compare(model, theirs, list(zip(trained(model).values(), others, strict=True)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_documents_see_the_prefix_and_not_each_other(kind: Transform) -> None:
    """A forest of segments in one pass equals each document alone, gradients too."""
    torch.manual_seed(1)
    model = kind(tiny())
    tokens = torch.randint(0, 32, (18,))
    layout = Layout((7, 4, 5, 2), (-1, -1, 1, -1))
    packed = model(tokens, Packed.of(layout))
    rows = [tokens[:7], tokens[7:16], tokens[16:]]
    alone = torch.cat([model(row) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    weight = torch.randn(packed.shape)
    (table,) = trained(model).values()
    first = torch.autograd.grad((packed * weight).sum(), table)[0]
    second = torch.autograd.grad((alone * weight).sum(), table)[0]
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@dataclass(eq=False)
class Cached(Context):
    """The simplest cache: one sequence, all keys and values in a row, the prefix first."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        self.keys[layer] = torch.cat([self.keys[layer], k])
        self.values[layer] = torch.cat([self.values[layer], v])
        places = torch.arange(len(self.keys[layer]))
        mask = attention_mask(self.positions[None], places[None], rule, q.dtype)
        parts = (t.transpose(0, 1)[None] for t in (q, self.keys[layer], self.values[layer]))
        return attention(*parts, mask, rule)[0].transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cached_equals_uncached(kind: Transform) -> None:
    """A token at a time behind a cache that begins with the prefix: what an engine does."""
    model = kind(tiny())
    whole = model(TOKENS[0])
    prefix = prefix_of(model)
    assert prefix is not None
    tables = prefix.tables(model)
    keys = {layer: t.keys for layer, t in tables.items()}
    values = {layer: t.values for layer, t in tables.items()}
    for place, token in enumerate(TOKENS[0]):
        position = torch.tensor([prefix.count + place])
        context = Cached(position, int(position) + 1, keys, values, prefix=prefix.count)
        torch.testing.assert_close(
            model(token[None], context)[0], whole[place], rtol=1e-4, atol=1e-4
        )


def test_a_cache_without_the_prefix_is_refused() -> None:
    model = PrefixTuning(tokens=5)(tiny())
    context = Cached(torch.tensor([0]), 1, {}, {})
    with pytest.raises(ConfigError, match=r"prefix of 5 positions, and Cached holds 0"):
        model(TOKENS[0, :1], context)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_lora_recomputation_and_copies(kind: Transform) -> None:
    model = kind(LoRA(rank=2, targets=("q",))(tiny()))
    assert {n.rpartition(".")[2] for n in trained(model)} == {"A", "B", "table"}
    assert len(trained(LoRA(rank=2, targets=("v",))(model))) == 9
    logits(model).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    other = copy.deepcopy(model)
    with torch.no_grad():
        prefix_of(other).virtual.table.add_(1.0)
    assert not torch.allclose(logits(other), logits(model))
    Recompute()(model)
    logits(model).square().sum().backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_trains_in_fp32_beside_a_rounded_base(kind: Transform) -> None:
    (table,) = trained(kind(tiny().bfloat16())).values()
    assert table.dtype == torch.float32


def test_prompts_start_as_scaled_embeddings() -> None:
    model = PromptTuning(tokens=5)(tiny().config.replace(embedding_scale=3.0).build())
    (table,) = trained(model).values()
    distances = torch.cdist(table.detach(), 3.0 * model.embedding.weight.detach())
    assert distances.amin(1).max() < 1e-2


def test_learned_positions_go_on_behind_the_prompt() -> None:
    """GPT-2: virtual tokens that are real embeddings equal those tokens in the text."""
    torch.manual_seed(0)
    config = gpt2().replace(vocab=32, dim=32, context=32, blocks=gpt2().blocks[:2])
    blocks = tuple(b.replace(mixer=b.mixer.replace(heads=4)) for b in config.blocks)
    model = config.replace(blocks=blocks, std=0.3).build()
    whole = model(torch.cat([TOKENS[1, :3], TOKENS[0]]))[3:]
    PromptTuning(tokens=3)(model)
    with torch.no_grad():
        prefix_of(model).virtual.table.copy_(model.embedding(TOKENS[1, :3]))
    torch.testing.assert_close(model(TOKENS[0]), whole, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a learned prefix already"):
        PromptTuning()(PrefixTuning()(tiny()))
    with pytest.raises(ConfigError, match="Linear is no decoder"):
        PromptTuning()(nn.Linear(2, 2))
    blocks = tiny().config.blocks
    wider = blocks[0].replace(mixer=blocks[0].mixer.replace(kv_heads=4))
    uneven = tiny().config.replace(blocks=(wider, blocks[1]))
    with pytest.raises(ConfigError, match="attention layers differ in their key-value heads"):
        PrefixTuning(tokens=2)(uneven.build())
    blind = tiny().config.replace(blocks=tuple(b.replace(mixer=Deaf()) for b in blocks))
    with pytest.raises(ConfigError, match="PromptTuning: the model has no attention layer"):
        PromptTuning(tokens=2)(blind.build())
    with pytest.raises(ConfigError, match="no learned prefix to save"):
        save_prefix(tiny(), tmp_path)
    save_adapter(LoRA(rank=2)(tiny()), tmp_path / "lora")
    with pytest.raises(ConfigError, match="LORA is no learned prefix"):
        load_prefix(tiny(), tmp_path / "lora")
    save_prefix(PromptTuning(tokens=3)(tiny()), tmp_path / "p")
    with pytest.raises(TreadleError, match="trained on another base"):
        load_prefix(tiny(seed=1), tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without our probe of the base, as PEFT writes
    with pytest.raises(TreadleError, match=r"is \(3, 32\), but here it must be \(tokens, 64\)"):
        load_prefix(tiny(dim=64), tmp_path / "p")
