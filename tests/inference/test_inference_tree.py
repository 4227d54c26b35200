"""Several guessed continuations in one pass: fewer passes still, and nothing else changes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from inference.test_inference_adapters import KINDS, folder_of
from tiny_generation import byte_tokenizer, tiny_model

from treadle.inference.attach import attach
from treadle.inference.draft_model import EarlyExit
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.guesses import Guesses
from treadle.inference.native_runner import NativeRunner
from treadle.inference.quantised import Quantised
from treadle.inference.request import Request
from treadle.inference.runner import Runner
from treadle.inference.sampling import Sampling
from treadle.inference.sequence import Active
from treadle.inference.speculative import Draft, Guesser, NGram
from treadle.inference.torch_runner import TorchRunner
from treadle.kernels.compiler import COMPILERS
from treadle.models.llama import tiny_llama
from treadle.tokenizers.tokenizer import Tokenizer

NO_END = ((256, -99.0),)


class Told(Draft):
    """Guesses that a test knows: the answer between wrong ones, or wrong ones alone."""

    answer: tuple[int, ...]
    reach: tuple[int, ...] = (0, 2, 4)
    """How many tokens of each path are right; a wrong one follows."""

    def open(self, runner: Runner, tokenizer: Tokenizer) -> Guesser:
        return Prompter(self)


class Prompter(Guesser):
    def __init__(self, draft: Told) -> None:
        self.draft = draft

    def guess(self, sequences: Sequence[Active], most: Sequence[int]) -> list[list[list[int]]]:
        return [
            [self._path(len(s.tokens), right)[:count] for right in self.draft.reach]
            for s, count in zip(sequences, most, strict=True)
        ]

    def _path(self, at: int, right: int) -> list[int]:
        known = list(self.draft.answer[at : at + right])
        wrong = self.draft.answer[at + right] ^ 1 if at + right < len(self.draft.answer) else 7
        return [*known, wrong]


def torch_runner(pages: int = 60) -> Runner:
    return TorchRunner(tiny_model(), pages=pages, page=4)


def native_runner(pages: int = 60) -> Runner:
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = tiny_llama(257, dim=64, layers=2, heads=2, hidden=96, context=128).build()
    return NativeRunner.of_model(model, pages=pages, page=16, threads=1)


def quantised_runner(pages: int = 60) -> Runner:
    return TorchRunner(tiny_model(), pages=pages, page=4, cache=Quantised(group=4))


RUNNERS = {"torch": torch_runner, "native": native_runner, "quantised": quantised_runner}


def opened(runner: Runner, draft: Draft | None) -> Engine:
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(draft=draft))


def all_free(engine: Engine) -> bool:
    blocks = engine.scheduler.blocks
    return blocks.available == blocks.pages and not any(blocks.references)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("reach", [(0, 2, 4), (4, 0, 2), (1, 3, 4, 4), (2, 2)], ids=str)
def test_the_longest_right_path_is_kept(kind: str, temperature: float, reach) -> None:
    """Wherever it stands among the paths, and whatever page the sequence has come to."""
    sampling = Sampling(temperature=temperature, max_tokens=41, logit_bias=NO_END)
    request = Request((3, 1, 4, 1, 5), sampling)
    ((plain,),) = opened(RUNNERS[kind](), None).generate([request])
    it = opened(RUNNERS[kind](), Told(answer=plain.tokens, reach=reach))
    ((found,),) = it.generate([request])
    assert found.tokens == plain.tokens
    assert found.logprobs == pytest.approx(plain.logprobs, abs=2e-3)
    longest = max(reach)
    passes = -(-40 // (longest + 1))
    assert it.verified == passes - (40 % (longest + 1) == 1)  # one token left: nothing to guess
    assert it.accepted == 40 - passes
    assert all_free(it)


def test_shared_beginnings_are_counted_and_asked_for_once() -> None:
    """Nodes of the tree, not tokens of its paths; repeated and shorter paths are left out."""
    guesses = Guesses.of([[1, 2, 3], [1, 2], [1, 2, 4, 5], [9], [], [1, 2, 3]])
    assert [p.tokens for p in guesses.paths] == [[1, 2, 3], [1, 2, 4, 5], [9]]
    guesses.keep(guesses.paths)
    assert [p.shared for p in guesses.paths] == [0, 2, 0]
    assert guesses.checked == 6
    guesses.keep(guesses.paths[1:])
    assert [p.shared for p in guesses.paths] == [0, 0]
    asked: list[list[int]] = []
    answer = (4, 9, 20, 5, 6, 7, 8, 9)
    it = opened(torch_runner(), Told(answer=answer, reach=(1, 3)))
    run = it.runner.run
    it.runner.run = lambda batch: asked.append(batch.outputs) or run(batch)  # type: ignore[func-returns-value,method-assign]
    it.submit(Request((1, 2), Sampling(temperature=0.0, max_tokens=6)))
    it.step()
    it.step()
    # x | 9 21 and x | 9 20 5 7, of which the logits behind 20, 5 and 7 are asked for
    assert asked == [[1], [3, 3]]


def test_draws_have_the_distribution_of_the_target() -> None:
    """Three tokens of many seeds against the product of the model's own probabilities."""
    letters = (3, 4, 5)
    only = tuple((t, 60.0) for t in letters)
    model = tiny_model()
    prompt = (7, 8)
    expected: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for text in product(letters, repeat=3):
            logits = model.logits(model(torch.tensor((*prompt, *text))))[1:4, list(letters)]
            logp = logits.log_softmax(-1)
            at = [letters.index(t) for t in text]
            expected[text] = float(logp[range(3), at].sum().exp())
    seeds = 1500
    asked = [
        Request(prompt, Sampling(seed=seed, max_tokens=3, logit_bias=only)) for seed in range(seeds)
    ]
    it = opened(torch_runner(600), EarlyExit(layers=1, tokens=2, widths=(2, 2)))
    found = Counter(answer[0].tokens for answer in it.generate(asked))
    assert 0.1 < it.accepted / it.verified < 1.9
    chi = sum((found[t] - seeds * p) ** 2 / (seeds * p) for t, p in expected.items())
    assert chi < 54.05  # the 0.999 quantile for 26 degrees of freedom


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("pages", [24, 80])
def test_text_is_that_of_plain_decoding_in_company(kind: str, pages: int) -> None:
    """With n, priorities, prompts that are read, penalties and preemption."""
    base = Sampling(max_tokens=24, temperature=0.4, logit_bias=((256, -99.0), (3, 9.0), (4, 9.0)))
    asked = [
        Request((5, 6, 7, 5, 6), base, n=3),
        Request((1, 2), base.replace(seed=4, frequency_penalty=0.5), priority=1),
        Request((3, 4, 3, 4, 3), base.replace(seed=5, repetition_penalty=1.3), prompt_logprobs=2),
        Request(tuple(range(30)), base.replace(seed=6, temperature=0.0, stop=("%%",))),
    ]
    pages = pages // 4 + 2 if kind == "native" else pages
    plain = opened(RUNNERS[kind](), None).generate(asked)
    it = opened(RUNNERS[kind](pages), NGram(shortest=1, branches=4))
    found = it.generate(asked)
    for mine, theirs in zip(found, plain, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
        assert [c.finish for c in mine] == [c.finish for c in theirs]
        assert [len(c.prompt) for c in mine] == [len(c.prompt) for c in theirs]
    assert it.accepted > 5
    assert all_free(it)


def test_guesses_throw_nobody_out() -> None:
    """Paths take what pages are left, and none that somebody else needs."""
    sampling = Sampling(max_tokens=30, temperature=0.0, logit_bias=((256, -99.0), (3, 9.0)))
    asked = [Request((i, 3, 3, 3, 3), sampling, priority=-i) for i in range(4)]
    plain = opened(torch_runner(4 * 9), None)
    answers = plain.generate(asked)
    assert plain.scheduler.preemptions == 0
    it = opened(torch_runner(4 * 9), NGram(shortest=1, branches=4))
    assert [a[0].tokens for a in it.generate(asked)] == [a[0].tokens for a in answers]
    assert it.accepted > 5
    assert it.scheduler.preemptions == 0
    assert all_free(it)


def test_a_constraint_holds_on_every_path() -> None:
    pytest.importorskip("llguidance")
    from treadle.inference.constrained import Regex

    tokenizer = byte_tokenizer()
    words = Regex(pattern="(ab|ac|ad){12}").build(tokenizer, 257)
    asked = [
        Request((1, 2, 3), Sampling(seed=seed, max_tokens=40), constraint=words)
        for seed in range(4)
    ]
    plain = opened(torch_runner(), None).generate(asked)
    it = opened(torch_runner(), NGram(shortest=1, branches=3))
    found = it.generate(asked)
    assert [a[0].text for a in found] == [a[0].text for a in plain]
    assert it.accepted > 20
    assert all_free(it)


def test_paths_take_the_adapter_of_their_sequence(tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.3, logit_bias=((256, -99.0), (3, 9.0)))
    asked = [Request((1, 2), sampling, adapter=name) for name in (None, "a", "b")]

    def with_adapters(draft: Draft | None) -> Engine:
        it = opened(torch_runner(), draft)
        for seed, name in enumerate("ab"):
            folder = folder_of(KINDS["small"], tmp_path / name, tiny_model(), seed)
            attach(it, name, str(folder))
        return it

    plain = with_adapters(None).generate(asked)
    it = with_adapters(NGram(shortest=1, branches=3))
    assert [a[0].tokens for a in it.generate(asked)] == [a[0].tokens for a in plain]
    assert it.accepted > 5
    assert all_free(it)


def test_a_pass_that_fails_gives_the_pages_back() -> None:
    it = opened(torch_runner(), Told(answer=(1, 2, 3, 4, 5, 6, 7, 8), reach=(1, 2, 3)))
    it.submit(Request((1, 2, 3), Sampling(temperature=0.0, max_tokens=8, logit_bias=NO_END)))
    it.step()
    held = it.scheduler.blocks.available
    run, it.runner.run = it.runner.run, None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        it.step()
    assert it.scheduler.blocks.available in (held, held - 1)  # the sequence's own next page
    it.runner.run = run  # type: ignore[method-assign]
    while it.running:
        it.step()
    assert all_free(it)
