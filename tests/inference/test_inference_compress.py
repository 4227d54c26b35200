"""Prompt compression against its definition, run anew for every segment."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_generation import END, byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.compress import CompressPrompt, compress_text
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.heavy_hitters import HeavyHitters

TOKENS = torch.randint(0, 250, (61,), generator=torch.Generator().manual_seed(5)).tolist()


def engine(**model) -> Engine:
    return Engine(tiny_model(**model), byte_tokenizer())


def by_definition(model: torch.nn.Module, rate: float, segment: int, fixed: set[int]) -> list[int]:
    kept: list[int] = []
    for start in range(0, len(TOKENS), segment):
        part = TOKENS[start : start + segment]
        costs = []
        for i, token in enumerate(part):
            before = [*kept, *part[:i]]
            if token in fixed:
                cost = 1e9
            elif before:
                with torch.no_grad():
                    logits = model.logits(model(torch.tensor(before)))[-1].double()
                cost = float(logits.logsumexp(-1) - logits[token])
            else:
                cost = 1e8
            costs.append((cost, i))
        count = max(math.ceil(rate * len(part)), sum(c >= 1e9 for c, _ in costs))
        kept += [part[i] for i in sorted(i for _, i in sorted(costs, reverse=True)[:count])]
    return kept


@pytest.mark.parametrize(("rate", "segment"), [(0.5, 16), (0.3, 7), (0.8, 100), (0.05, 1)])
def test_equals_the_definition(rate: float, segment: int) -> None:
    it = engine()
    marks = {t for t in TOKENS if it.tokenizer.token_bytes(t) in (b"\n", b"a", b"Q")} | {END}
    text = [*TOKENS[:20], END, *TOKENS[20:]]
    way = CompressPrompt(rate=rate, segment=segment, keep=("\n", "a", "Q"))
    assert way(it, TOKENS) == by_definition(it.runner.model, rate, segment, marks)
    assert END in way(it, text)
    blocks = it.scheduler.blocks
    assert blocks.available == blocks.pages


def test_everything_stays_where_all_of_it_may() -> None:
    assert CompressPrompt(rate=1.0)(engine(), TOKENS) == TOKENS
    assert CompressPrompt()(engine(), []) == []


def test_a_prompt_beyond_the_context_can_be_made_to_fit() -> None:
    it = engine(context=40)
    short = CompressPrompt(rate=0.25, segment=8)(it, TOKENS)
    assert 61 / 4 <= len(short) <= 61 / 4 + 8
    rest = iter(TOKENS)
    assert all(token in rest for token in short), "in their order"
    with pytest.raises(TreadleError, match=r"are 48 tokens.*context is 40.*CompressPrompt.rate"):
        CompressPrompt(rate=0.9, segment=8)(it, TOKENS)


def test_the_last_paragraph_is_left_alone() -> None:
    it = engine()
    short = compress_text(
        it, "One.\nTwo three four five.\n\nWhat is six?", CompressPrompt(rate=0.3)
    )
    body, _, question = short.rpartition("\n\n")
    assert question == "What is six?"
    assert len(body) == math.ceil(0.3 * len("One.\nTwo three four five."))
    assert "\n" in body
    with pytest.raises(TreadleError, match="put a blank line between"):
        compress_text(it, "What is six?", CompressPrompt())


def test_a_cache_that_forgets_is_refused() -> None:
    it = Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache=HeavyHitters()))
    with pytest.raises(TreadleError, match="pages that last"):
        CompressPrompt()(it, TOKENS)
