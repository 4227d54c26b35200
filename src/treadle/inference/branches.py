"""Continuations that share pages: what a search over texts does with a runner.

A branch is a sequence of computed tokens. Branches fork without copying and grow together in one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.blocks import Blocks
from treadle.inference.runner import Batch, Runner


@dataclass(eq=False)
class Branch:
    """Pages and how many tokens they hold."""

    table: list[int]
    length: int = 0


class Branches:
    """Branches over the pages of one runner; whoever opens one closes it."""

    def __init__(self, runner: Runner, blocks: Blocks, adapter: str | None = None) -> None:
        self.runner, self.blocks, self.adapter = runner, blocks, adapter
        if not runner.lasting:
            raise TreadleError(
                "a search needs pages that last: use a cache of kind Paged or Quantised"
            )
        shelf = runner.adapters
        if shelf is not None and adapter is not None and not shelf.bring({adapter}):
            raise TreadleError(f"all {shelf.slots} adapter slots are in use; try again")
        self.mark = b"" if shelf is None else shelf.mark(adapter)

    def open(self, tokens: Sequence[int]) -> Branch:
        """A branch that holds as much of the beginning of these tokens as is known already."""
        found = self.blocks.find(tokens, mark=self.mark)
        self.blocks.hold(found)
        return Branch(found, len(found) * self.blocks.page)

    def fork(self, branch: Branch) -> Branch:
        self.blocks.hold(branch.table)
        return Branch(list(branch.table), branch.length)

    def close(self, branch: Branch) -> None:
        self.blocks.release(branch.table)
        branch.table, branch.length = [], 0

    @torch.inference_mode()
    def run(self, work: Sequence[tuple[Branch, Sequence[int], int]]) -> Float[Tensor, "N V"]:
        """Append tokens to each branch in one pass; logits of the last so many of each.

        Raises:
            TreadleError: there are not enough pages; no branch has changed its tokens.
        """
        page = self.blocks.page
        for branch, tokens, _ in work:
            first = branch.length // page
            if first < len(branch.table) and self.blocks.shared(branch.table[first]):
                self._own(branch, first)
            missing = -(-(branch.length + len(tokens)) // page) - len(branch.table)
            branch.table += [self._take() for _ in range(missing)]
        logits = self.runner.run(
            Batch(
                tokens=[t for _, tokens, _ in work for t in tokens],
                counts=[len(tokens) for _, tokens, _ in work],
                starts=[branch.length for branch, _, _ in work],
                tables=[branch.table for branch, _, _ in work],
                outputs=[wanted for _, _, wanted in work],
                adapters=[self.adapter] * len(work),
            )
        )
        for branch, tokens, _ in work:
            branch.length += len(tokens)
        return logits

    def _own(self, branch: Branch, at: int) -> None:
        fresh = self._take()
        self.runner.copy(branch.table[at], fresh)
        self.blocks.release([branch.table[at]])
        branch.table[at] = fresh

    def _take(self) -> int:
        if not self.blocks.available:
            raise TreadleError(
                f"all {self.blocks.pages} pages of {self.blocks.page} tokens are in use: raise "
                "EngineConfig.cache_tokens, or ask for fewer beams or tokens"
            )
        return self.blocks.take()
