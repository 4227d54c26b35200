"""The ledger counts what torch's own allocations are, and the rehearsal what a step is made of."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble
from treadle.kernels.attention import AttentionRule, attention
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.peft.lora import LoRA
from treadle.planning.ledger import rehearsing
from treadle.planning.rehearse import Job, Needs, rehearse
from treadle.quantization.int8 import Int8
from treadle.train.precision import BF16
from treadle.train.recompute import Recompute

KB = 4 * 1000


class Frozen(Transform):
    """Trains nothing."""

    def __call__(self, model):
        return model.requires_grad_(False)


def batch(rows: int = 4, width: int = 64):
    return assemble([Piece([5] * width, [True] * width)] * rows)


def job(**changes) -> Job:
    decoder = tiny_model(None, None, None).config
    return Job(**{"decoder": decoder, "batches": (batch(),), **changes})


def test_counts_what_is_alive() -> None:
    with rehearsing() as ledger:
        a = torch.zeros(1000)
        assert ledger.alive == KB
        b = a + 1
        c = b.view(10, 100)  # no memory of its own
        assert ledger.alive == 2 * KB
        del b
        assert ledger.alive == 2 * KB  # the view holds it
        del c
        assert (ledger.alive, ledger.peak) == (KB, 2 * KB)
        ledger.mark()
        assert ledger.peak == KB


def test_counts_products_and_what_autograd_keeps() -> None:
    with rehearsing() as ledger:
        w = torch.zeros(30, 20, requires_grad=True)
        x = torch.zeros(10, 20)
        y = torch.nn.functional.linear(x, w)
        assert ledger.flops == 2 * 10 * 20 * 30
        z = y.exp().sum()
        held = 4 * (600 + 200 + 300 + 300 + 1)
        assert ledger.alive == held  # exp keeps its result, which nobody else holds
        z.backward()
        assert ledger.flops == 4 * 10 * 20 * 30


@pytest.mark.parametrize(("causal", "share"), [(False, 1.0), (True, 0.5)])
def test_counts_attention(causal: bool, share: float) -> None:
    """q k' and p v; for gradients the scores again, and those of values, weights, q and k."""
    with rehearsing() as ledger:
        q, k, v = (torch.zeros(2, h, 48, 16, requires_grad=True) for h in (6, 3, 3))
        pairs = share * 2 * 6 * 48 * 48
        rule = AttentionRule(scale=1.0, causal=causal)
        out = attention(q, k, v, None, rule)
        assert ledger.flops == 2 * pairs * (16 + 16)
        out.sum().backward()
        assert ledger.flops == 2 * pairs * (2 + 5) * 16
        ledger.flops = 0
        half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
        attention(*half, None, rule).sum().backward()
        assert ledger.flops == 2 * pairs * (2 + 5) * 16


def test_tensors_with_numbers_stay_so() -> None:
    positions = torch.arange(5)
    with rehearsing():
        assert int(positions.max()) == 4
        x = torch.zeros(9, 3)[positions]
        assert x.shape == (5, 3)
        assert bool(x.isfinite().all())  # what depends on numbers is taken as true


def test_modules_move_to_another_type() -> None:
    before = torch.nn.Module.to
    with rehearsing():
        layer = torch.nn.Linear(3, 3).to(torch.bfloat16).to("cpu")
        assert layer.weight.dtype == torch.bfloat16
    assert torch.nn.Module.to is before


def needs(**changes) -> Needs:
    return rehearse(job(**changes))


def test_parts_of_full_training() -> None:
    full = job()
    found = rehearse(full)
    size = sum(p.numel() for p in tiny_model(None, None, None).parameters())
    assert found.parameters == found.trained == size
    assert found.weights == found.gradients == 4 * size
    slack = 64 * 64  # AdamW's step counters
    assert 8 * size <= found.optimizer <= 8 * size + slack
    with rehearsing() as ledger:  # the same two steps, written out
        model = full.decoder.build().train()
        optimizer = AdamW(lr=1e-4).build(list(model.named_parameters()))
        kept = []
        for _ in range(2):
            ledger.mark()
            before = ledger.alive
            loss = CausalLM()(model, full.batches[0]).total
            kept.append(ledger.alive - before)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    assert found.activations == max(kept)
    assert found.alive == ledger.peak > found.loading


def test_work_is_that_of_a_real_step() -> None:
    """With the attention's, which torch does not count on a CPU: 3 layers, 4 rows of 64 tokens, of
    which one sees half, 16 numbers in all heads of a token, 7 products."""
    model, counter = tiny_model(None, None, None), FlopCounterMode(display=False)
    with counter:
        CausalLM()(model, batch()).total.backward()
    attention = 3 * 4 * 64 * (64 // 2) * 16 * 2 * 7
    assert needs().flops == counter.get_total_flops() + attention


def test_adapters_need_less_and_train_what_they_have() -> None:
    full, lora = needs(), needs(transforms=(LoRA(rank=2),))
    real = LoRA(rank=2)(tiny_model(None, None, None))
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert lora.trained == trained
    assert lora.gradients == 4 * trained
    assert lora.optimizer < full.optimizer / 4
    assert lora.flops < full.flops  # no gradient of the base


def test_recomputation_keeps_less_and_works_more() -> None:
    plain, again = needs(), needs(transforms=(Recompute(),))
    assert again.activations < plain.activations / 2
    assert plain.flops < again.flops < 1.4 * plain.flops


def test_half_precision_and_packed_weights_are_smaller() -> None:
    lora = needs(transforms=(LoRA(rank=2),))
    half = needs(transforms=(LoRA(rank=2),), precision=BF16())
    packed = needs(transforms=(Int8(), LoRA(rank=2)))
    assert half.weights < 0.6 * lora.weights
    assert packed.weights < lora.weights
    assert packed.loading >= lora.loading  # dense before it is packed


def test_work_grows_with_micro_batches_and_memory_does_not() -> None:
    one, two, three = (needs(batches=(batch(),) * n) for n in (1, 2, 3))
    assert two.flops == 2 * one.flops
    assert one.alive <= two.alive == three.alive  # gradients are there in the second


def test_teacher_counts() -> None:
    decoder = tiny_model(None, None, None).config
    objective = Distil(terms=(SoftLabels(),))
    alone = needs()
    taught = needs(teacher=decoder, objective=objective)
    assert taught.weights == 2 * alone.weights
    assert taught.gradients == alone.gradients
    assert taught.flops > alone.flops


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(TreadleError, match="nothing trains"):
        needs(transforms=(Frozen(),))
