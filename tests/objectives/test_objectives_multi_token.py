"""The loss of heads that look further ahead, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from treadle.core.errors import ConfigError
from treadle.data.batch import Batch, Piece, assemble
from treadle.models.decoder import DecoderModel
from treadle.models.llama import tiny_llama
from treadle.models.mtp import MTP, AheadHead, ChainedBlock, ChainedLayer, MedusaHead, heads_of
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.objectives.causal import CausalLM
from treadle.objectives.multi_token import MultiToken
from treadle.objectives.objective import LossOutput, Objective
from treadle.peft.chosen import ChosenLayers

TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9]]


def model_with(head: AheadHead) -> DecoderModel:
    torch.manual_seed(1)
    decoder = tiny_llama(11, dim=32, layers=2, heads=4, hidden=48, context=64)
    model = MTP(heads=2, head=head)(decoder.replace(std=0.3).build())
    heads = heads_of(model)
    assert heads is not None
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def packed(skip: int = 0) -> Batch:
    """Documents; of each the first tokens are not to be predicted."""
    return assemble([Piece(t, [i >= skip for i in range(len(t))]) for t in TEXTS])


@pytest.mark.parametrize("head", [MedusaHead(), ChainedLayer(), ChainedBlock()], ids=str)
@pytest.mark.parametrize("skip", [0, 3])
def test_equals_a_loop_over_texts(head: AheadHead, skip: int) -> None:
    """Each text by itself, each place by itself; gradients too."""
    model, weight = model_with(head), 0.7
    output = MultiToken(weight=weight)(model, packed(skip))
    (output.total / output.weight).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    heads = heads_of(model)
    assert heads is not None
    total, count, right = torch.zeros(()), 0, [0, 0]
    for text in TEXTS:
        tokens = torch.tensor(text)
        context = Packed.of(Layout((len(text),)))
        hidden = model(tokens, context)
        ahead = heads(model, hidden, tokens, context)
        for i in range(max(1, skip), len(text)):
            count += 1
            total = total - model.logits(hidden[i - 1]).log_softmax(-1)[text[i]]
            for k in (1, 2):
                if i - 1 - k >= 0:
                    logits = model.logits(ahead[k - 1][i - 1 - k])
                    total = total - weight / 2 * logits.log_softmax(-1)[text[i]]
                    right[k - 1] += int(logits.argmax() == text[i])
    (total / count).backward()
    assert float(output.weight) == count
    assert not model._forward_hooks
    assert_close(output.total, total, atol=1e-4, rtol=1e-4)
    assert [int(output.metrics[f"ahead_{k}"]) for k in (1, 2)] == right
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_two_micro_batches_equal_one() -> None:
    model = model_with(ChainedLayer())
    whole = MultiToken()(model, packed())
    parts = [
        MultiToken()(model, assemble([Piece(t, [True] * len(t)) for t in texts]))
        for texts in (TEXTS[:1], TEXTS[1:])
    ]
    assert_close(sum(p.total for p in parts), whole.total, atol=1e-4, rtol=1e-4)
    assert float(sum(p.weight for p in parts)) == float(whole.weight)


def test_heads_learn_behind_a_frozen_model() -> None:
    """A text that repeats itself: the heads come to know it, the model stays what it was."""
    model = ChosenLayers(layers=("mtp",))(model_with(ChainedLayer()))
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("mtp")}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    batch = assemble([Piece([1, 2, 3, 4, 5] * 6, [True] * 30)])
    accuracies = []
    for _ in range(60):
        output = MultiToken()(model, batch)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        accuracies.append(float(output.metrics["ahead_2"] / output.weight))
    assert accuracies[0] < 0.5 < 0.9 < accuracies[-1]
    for name, parameter in model.named_parameters():
        assert name.startswith("mtp") or torch.equal(parameter, before[name])


class Twice(Objective):
    """Runs the model twice."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        CausalLM()(model, batch)
        return CausalLM()(model, batch)


def test_what_does_not_fit_is_named() -> None:
    plain = tiny_llama(11, dim=32, layers=1, heads=4, hidden=48, context=64).build()
    with pytest.raises(ConfigError, match="no heads ahead: add MTP"):
        MultiToken()(plain, packed())
    with pytest.raises(ConfigError, match="Twice runs the model 2 times"):
        MultiToken(objective=Twice())(model_with(MedusaHead()), packed())
