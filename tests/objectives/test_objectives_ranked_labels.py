"""Universal logit distillation against a sorted float64 loop; gradients by autograd."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from train.tiny import VOCAB, documents, tiny_model

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, assemble
from treadle.kernels import linear_cross_entropy as lce
from treadle.models.decoder import DecoderModel, LinearHead
from treadle.objectives.distil import Distil, TaughtBatch
from treadle.objectives.ranked_labels import RankedLabels


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lce, "CHUNK_ELEMENTS", 5 * VOCAB)
    monkeypatch.setattr(lce, "CHUNK_ROWS", 5)


def student() -> DecoderModel:
    model = tiny_model()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def ranked_batch(ranks: int, vocab: int) -> TaughtBatch:
    """Every other prediction has a partner; a teacher of `vocab` tokens gives `ranks` of them."""
    batch = assemble(documents(0, 4))
    rows = torch.arange(0, len(batch.targets), 2)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(rows), vocab, generator=generator)
    logprobs = logits.log_softmax(-1).sort(-1, descending=True).values[:, :ranks]
    plain = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    plain["weights"] = 0.5 + torch.rand(len(batch.targets), generator=generator)
    return TaughtBatch(**plain, ranked_rows=rows, ranked_logprobs=logprobs)


def naive(model: DecoderModel, batch: TaughtBatch, ranks: int) -> torch.Tensor:
    hidden = model(batch.tokens, batch.context())[batch.sources]
    total = weight = 0.0
    for row, logprobs in zip(batch.ranked_rows.tolist(), batch.ranked_logprobs, strict=True):
        q = model.logits(hidden[row]).softmax(-1).sort(descending=True).values
        p = logprobs.double().exp()
        cost = sum((p[r] - q[r]).abs() for r in range(ranks))
        cost = cost + ((1 - p[:ranks].sum()) - (1 - q[:ranks].sum())).abs()
        total = total + batch.weights[row].double() * cost
        weight = weight + batch.weights[row].double()
    return total / weight


@pytest.mark.parametrize(("ranks", "vocab"), [(7, 90), (3, 4), (VOCAB - 1, VOCAB)])
def test_matches_sorted_loop(ranks: int, vocab: int) -> None:
    batch = ranked_batch(ranks, vocab)
    ours, theirs = student(), student().double()
    output = Distil(terms=(RankedLabels(),))(ours, batch)
    loss, expected = output.total / output.weight, naive(theirs, batch, ranks)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=2e-3, atol=2e-6, msg=name)


def test_which_token_is_which_does_not_matter() -> None:
    """A student whose vocabulary is shuffled has the same distance; one that agrees has none."""
    batch = ranked_batch(5, 40)
    torch.manual_seed(3)
    model = tiny_model().config.replace(head=LinearHead()).build()
    with torch.no_grad():
        model.head.weight.copy_(torch.randn_like(model.head.weight))
    before = Distil(terms=(RankedLabels(),))(model, batch).total.detach()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[torch.randperm(VOCAB)])
        after = Distil(terms=(RankedLabels(),))(model, batch).total
        torch.testing.assert_close(after, before)
        hidden = model(batch.tokens, batch.context())[batch.sources[batch.ranked_rows]]
        own = model.logits(hidden).log_softmax(-1).sort(-1, descending=True).values[:, :5]
        same = {**vars(batch), "ranked_logprobs": own}
        assert float(Distil(terms=(RankedLabels(),))(model, TaughtBatch(**same)).total) < 1e-4
    assert float(before) > 0.1


def test_missing_signal_and_no_pairs() -> None:
    whole = ranked_batch(5, 40)
    batch = TaughtBatch(**{f.name: getattr(whole, f.name) for f in fields(Batch)})
    with pytest.raises(TreadleError, match=r"RankedLabels.*OtherTokenizer"):
        Distil(terms=(RankedLabels(),))(student(), batch)
    none = {**vars(whole), "ranked_rows": whole.ranked_rows[:0]}
    none["ranked_logprobs"] = whole.ranked_logprobs[:0]
    assert float(Distil(terms=(RankedLabels(),))(student(), TaughtBatch(**none)).total) == 0.0
