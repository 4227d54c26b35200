"""Samplers: what they say of their tokens is what the model behind them computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer

from treadle.alignment.rollouts import Group, Rollouts, RolloutStream
from treadle.alignment.samplers import MergedAdapters, NativeKernels, Sampler
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.kernels.compiler import COMPILERS
from treadle.models.decoder import DecoderModel
from treadle.models.llama import tiny_llama
from treadle.objectives.policy import GRPO
from treadle.peft.adapter import adapted, merge
from treadle.peft.lora import LoRA

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
compiled = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


class Vowels(Problems):
    """Reward: vowels of the answer, so that groups differ."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index}"),), "", "vowels")

    def score(self, problem: Problem, completion: str) -> float:
        return sum(c in "aeiou" for c in completion) / 12 + len(completion.encode()) / 100


def llama(seed: int = 0) -> DecoderModel:
    torch.manual_seed(seed)
    decoder = tiny_llama(257, dim=64, layers=2, heads=2, hidden=96, context=128)
    return decoder.replace(std=0.15).build()


def with_adapters(model: DecoderModel) -> DecoderModel:
    """Adapters that have learned something already."""
    model = LoRA(rank=4)(model)
    with torch.no_grad():
        for layer in adapted(model).values():
            for parameter in layer.trained():
                parameter.normal_(std=0.07)
    return model


def opened(sampler: Sampler, model: DecoderModel, folder: Path, device: str = "cpu"):
    source = Rollouts(
        problems=Vowels(),
        prompts=2,
        completions=4,
        sampling=Sampling(max_tokens=12, temperature=0.8),
        sampler=sampler,
    )
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return source.open(Env(model=model, tokenizer=tokenizer, scratch=folder, device=device))


def mismatch(stream: RolloutStream, model: DecoderModel) -> float:
    total, weight = 0.0, 0.0
    for batch in next(stream).batches:
        output = GRPO()(model, batch)
        total += float(output.metrics["mismatch"])
        weight += float(output.weight)
    return total / weight


def test_merged_adapters_sample_the_same_policy(tmp_path: Path) -> None:
    model = with_adapters(llama())
    before = {n: p.clone() for n, p in model.named_parameters()}
    stream = opened(MergedAdapters(), model, tmp_path)
    assert mismatch(stream, model) < 1e-5
    with torch.no_grad():
        for layer in adapted(model).values():
            for parameter in layer.trained():
                parameter.mul_(-2.0)
    assert mismatch(stream, model) < 1e-5
    assert len(adapted(model)) > 0
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert set(before) == {n for n, _ in model.named_parameters()}


@compiled
def test_native_kernels_sample_the_merged_model_of_now(tmp_path: Path) -> None:
    """Log-probabilities are near those of the model with its adapters as they are, and far from
    those of the model before they moved."""
    model = with_adapters(llama())
    stream = opened(NativeKernels(), model, tmp_path)
    before = llama()
    for _ in range(2):
        now = with_adapters(llama())
        now.load_state_dict(model.state_dict())
        groups = stream.roll()
        near, far = distance(groups, merge(now)), distance(groups, before)
        assert 0 < near < 0.06
        assert far > 6 * near
        before = now
        with torch.no_grad():
            for layer in adapted(model).values():
                for parameter in layer.trained():
                    parameter.mul_(-1.5)


@torch.no_grad()
def distance(groups: list[Group], model: DecoderModel) -> float:
    """Mean |log pi - log mu| of the sampled tokens under a plain model, one sequence at a time."""
    gaps = []
    for group in groups:
        for c in group.completions:
            logits = model.logits(model(torch.tensor([*group.prompt, *c.tokens]))).float() / 0.8
            logp = logits.log_softmax(-1)[len(group.prompt) - 1 : -1]
            wanted = logp.gather(-1, torch.tensor(c.tokens)[:, None])[:, 0]
            gaps.append((wanted - torch.tensor(c.logprobs)).abs())
    return float(torch.cat(gaps).mean())


def test_samplers_refuse_what_they_cannot_sample(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="the model has no adapters"):
        opened(MergedAdapters(), llama(), tmp_path)
    with pytest.raises(TreadleError, match="run on processors, but the model trains on cuda"):
        opened(NativeKernels(), llama(), tmp_path, device="cuda")


def test_adapters_that_are_stored_in_bfloat16_are_folded_in() -> None:
    """A model that is only sampled from has all its weights in the compute dtype."""
    whole, half = merge(with_adapters(llama())), merge(with_adapters(llama()).bfloat16())
    for a, b in zip(half.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
