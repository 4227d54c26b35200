"""DPO against the paper's formula on separate sequences; learning through the source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.preferences import PairFiles, Preferences
from treadle.core.errors import TreadleError
from treadle.data.source import Env
from treadle.data.split import LeakFreeSplit
from treadle.models.decoder import DecoderModel
from treadle.objectives.dpo import DPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, StepReport
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

WORDS = ("tea", "milk", "bread", "honey")


def source(tmp_path: Path, rows: list[dict[str, str]] | None = None, **changes) -> Preferences:
    rows = rows or [
        {"prompt": f"do you like {w}?", "chosen": f"yes, {w}", "rejected": f"no {w} at all"}
        for w in WORDS
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = PairFiles(path=str(path), parts=LeakFreeSplit(validation=0, test=0))
    return Preferences(pairs=pairs, per_step=4, **changes)


def env(model: DecoderModel, tmp_path: Path) -> Env:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return Env(model=model, tokenizer=byte_tokenizer().with_template(template), scratch=tmp_path)


def moved(seed: int = 3) -> DecoderModel:
    """The model some way off its reference."""
    model = tiny_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def row_logprobs(model: DecoderModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model.logits(model(torch.tensor(prompt + answer)))
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(answer)[:, None]).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_match_separate_sequences(smoothing: float, tmp_path: Path) -> None:
    """Each answer after its own copy of the prompt, put into the formula term by term."""
    beta = 0.3
    stream = source(tmp_path).open(env(tiny_model(), tmp_path))
    (batch,) = next(stream).batches
    ours, theirs = moved(), moved()
    output = DPO(beta=beta, label_smoothing=smoothing)(ours, batch)
    loss = output.total / output.weight
    loss.backward()

    losses = []
    for index in range(4):
        prompt, chosen, rejected = (list(p.tokens) for p in stream.tree(index))
        with torch.no_grad():
            reference = [row_logprobs(tiny_model(), prompt, a) for a in (chosen, rejected)]
        policy = [row_logprobs(theirs, prompt, a) for a in (chosen, rejected)]
        losses.append(formula(policy, reference, beta, smoothing))
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)


def formula(policy, reference, beta: float, smoothing: float) -> torch.Tensor:
    """Equation 7 of Rafailov et al.; with smoothing, equation 3 of Mitchell's note."""
    delta = (policy[0] - reference[0]) - (policy[1] - reference[1])
    log = torch.nn.functional.logsigmoid
    return -log(beta * delta) * (1 - smoothing) - log(-beta * delta) * smoothing


class Accuracies(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(report.metrics["accuracy"])


def test_preferences_are_learned_and_the_reference_is_kept(tmp_path: Path) -> None:
    model, accuracies = tiny_model(), Accuracies()
    plan = SingleProcess()
    stream = source(tmp_path).open(env(model, tmp_path))
    kept = (tmp_path / "reference.safetensors").read_bytes()
    fit(
        model,
        stream,
        DPO(),
        optimizer=AdamW(lr=3e-3),
        schedule=Constant(),
        config=Fit(steps=12, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=tmp_path / "checkpoints",
        hooks=[accuracies],
    )
    assert accuracies.seen[0] == 0.0  # margins start at zero
    assert accuracies.seen[-1] == 1.0
    source(tmp_path).open(env(model, tmp_path))
    assert (tmp_path / "reference.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "x", "chosen": "same", "rejected": "same"}, {}, "pair 0.*are the same"),
        ({"prompt": "long " * 9, "chosen": "a", "rejected": "b"}, {"longest": 20}, "no room"),
    ],
)
def test_bad_pairs(row, changes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=message):
        source(tmp_path, [row], **changes).open(env(tiny_model(), tmp_path))
