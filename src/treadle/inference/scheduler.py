"""Which tokens run in the next pass: continuous batching with chunked prefill and preemption.

Sequences join and leave between passes. All that decode advance by a token; what the token budget
leaves goes to prompts, of which a long one is computed in chunks. Where pages run out the last in
rank gives up its pages and is computed again later; as its sampling depends on its own seed and
step alone, its text is the same as if it had never been disturbed.
"""

from __future__ import annotations

import logging
from bisect import insort

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.inference.blocks import Blocks
from treadle.inference.guesses import Guesses
from treadle.inference.prefix_folder import PrefixFolder
from treadle.inference.runner import Runner
from treadle.inference.sequence import Active

CARD = Card(
    id="inf.continuous",
    paper="Yu et al. 2022, Orca; Agrawal et al. 2023, SARATHI, arXiv:2308.16369",
    summary="Requests join and leave between tokens; long prompts run in chunks; preemption.",
    recipe="treadle generate smollm2-135m-instruct The -n 8 --temperature 1",
    oracle="tests/inference/test_inference_continuous.py::test_random_traffic",
)

log = logging.getLogger("treadle")


READ = 256
"""Most tokens of a prompt in one pass whose logits are all wanted: a vocabulary of them each."""


class QueueFullError(TreadleError):
    """As many requests wait as the engine lets wait: try again later."""


class Scheduler:
    """Sequences that wait and sequences that run, over one set of pages."""

    def __init__(
        self,
        blocks: Blocks,
        runner: Runner,
        *,
        slots: int,
        tokens: int,
        folder: PrefixFolder | None = None,
    ) -> None:
        self.blocks, self.runner, self.folder = blocks, runner, folder
        self.slots, self.tokens = slots, tokens
        self.waiting: list[Active] = []
        self.running: list[Active] = []
        self.preemptions = 0

    def add(self, sequence: Active) -> None:
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def schedule(self) -> list[tuple[Active, int]]:
        """Sequences of the next pass with how many of their pending tokens run."""
        budget, before = self.tokens, self.preemptions
        plan: list[tuple[Active, int]] = []
        for sequence in sorted(self.running, key=lambda s: s.rank):
            prefill = sequence.pending > 1
            if self.blocks.available < len(self.running) + len(sequence.guesses.trunk):
                # Guesses are no reason to preempt anybody.
                sequence.guesses = Guesses([])
            share = min(budget, READ) if sequence.reads else budget
            count = min(sequence.pending, share) if prefill else 1 + len(sequence.guesses.trunk)
            if count and self._make_room(sequence, count):
                plan.append((sequence, count))
                budget -= count if prefill else 0
        while self.waiting and budget and self.preemptions == before:
            sequence = self.waiting[0]
            if not self._admit(sequence, budget):
                break
            count = min(sequence.pending, READ if sequence.reads else budget, budget)
            if not self._make_room(sequence, count):
                break
            plan.append((sequence, count))
            budget -= count
        for sequence, _ in plan:
            self._branch(sequence)
        return plan

    def commit(self, plan: list[tuple[Active, int]]) -> None:
        """The pass has run: pages that became full can be found by others."""
        page = self.blocks.page
        for sequence, count in plan:
            # Guesses count when they are accepted.
            sequence.computed += count - len(sequence.guesses.trunk)
            if self.runner.lasting and sequence.computed // page > len(sequence.keys):
                known = sequence.slice(0, sequence.computed)
                for key in self.blocks.chain(known, sequence.keys, mark=sequence.mark):
                    place = sequence.table[len(sequence.keys)]
                    self.blocks.name(place, key)
                    sequence.keys.append(key)
                    prompt = len(sequence.keys) * page <= len(sequence.request.prompt)
                    if self.folder is not None and prompt:
                        self.folder.put(key, self.runner.save(place))

    def settle(self, plan: list[tuple[Active, int]]) -> None:
        """Tokens are drawn: the path that they took has its pages, the others give theirs back."""
        for sequence, _ in plan:
            guesses, sequence.guesses = sequence.guesses, Guesses([])
            for path in guesses.paths:
                if path.pages and path is guesses.live[0]:
                    first = (sequence.computed - 1 - guesses.right) // self.blocks.page
                    own, sequence.table[first:] = sequence.table[first:], path.pages
                    path.pages = own
                self.blocks.release(path.pages)

    def part(self, sequence: Active) -> list[Active]:
        """The prompt is computed: the request's other completions share it from here on."""
        forks, sequence.forks = sequence.forks, []
        for fork in forks:
            self.blocks.hold(sequence.table)
            fork.table, fork.keys = list(sequence.table), list(sequence.keys)
            fork.computed, fork.cached = sequence.computed, sequence.cached
            fork.readings = sequence.readings
            self.runner.fork(sequence.name, fork.name)
        self.running += forks
        return forks

    def reap(self) -> list[Active]:
        """Take out what is finished and free its pages."""
        gone = [s for s in self.running if s.finish is not None]
        for sequence in gone:
            self._drop(sequence)
        if gone:
            self.running = [s for s in self.running if s.finish is None]
        lost = [s for s in self.waiting if s.finish is not None]
        if lost:
            self.waiting = [s for s in self.waiting if s.finish is None]
        return [s for leader in (*gone, *lost) for s in (leader, *leader.forks)]

    def forget(self) -> None:
        """Nothing computed so far counts: what runs starts again from its tokens.

        The folder on disk belongs to the weights of before and is not used any more.
        """
        self.folder = None
        for sequence in list(self.running):
            self._preempt(sequence)
        self.blocks.forget()
        self.runner.forget()

    def _admit(self, sequence: Active, budget: int) -> bool:
        """Move the first that waits to those that run, if there is room for all of it."""
        busy = sum(1 + len(s.forks) for s in self.running)
        if busy + 1 + len(sequence.forks) > self.slots or not self._adapter_fits(sequence):
            return False
        known = sequence.slice(0, sequence.length)
        # What is found has no logits: a prompt that is to be read token by token is computed.
        found = [] if sequence.reads else self.blocks.find(known, mark=sequence.mark)
        rest = len(known) - len(found) * self.blocks.page
        # A prompt that the next pass can take whole is not cut in two by this one.
        if budget < rest <= self.tokens:
            return False
        self.blocks.hold(found)
        missing = -(-len(known) // self.blocks.page) - len(found)
        # A page to spare, lest the first token that others draw throws this one out again.
        if missing + bool(self.running) > self.blocks.available:
            self.blocks.release(found)
            return False
        if self.folder is not None and not sequence.reads:
            self._read(self.folder, known, found, sequence.mark)
        sequence.table, sequence.computed = found, len(found) * self.blocks.page
        sequence.keys = [self.blocks.keys[page] for page in found]
        sequence.cached = min(sequence.computed, len(sequence.request.prompt))
        self.running.append(self.waiting.pop(0))
        return True

    def _adapter_fits(self, sequence: Active) -> bool:
        """Whether its adapter is in memory beside those of the running ones, fetched if need be."""
        shelf, name = self.runner.adapters, sequence.request.adapter
        if shelf is None or name is None:
            return True
        others = {s.request.adapter for s in self.running if s.request.adapter is not None}
        try:
            return shelf.bring({name, *others})
        except TreadleError as error:  # its folder is gone: that ends this request only
            log.warning("request %d ends: %s", sequence.job, error)
            for member in (sequence, *sequence.forks):
                member.end("cancelled")
            return False

    def _read(self, folder: PrefixFolder, known: list[int], found: list[int], mark: bytes) -> None:
        """Add to the pages found in memory those that are on disk."""
        keys = [self.blocks.keys[page] for page in found]
        for key in self.blocks.chain(known[:-1], keys, mark=mark):
            content = folder.get(key)
            if content is None:
                break
            page = self.blocks.take()
            self.runner.load(page, content)
            self.blocks.name(page, key)
            found.append(page)

    def _make_room(self, sequence: Active, count: int) -> bool:
        """Pages for the next tokens, if need be from those last in rank; False if it is the last
        itself and was preempted, or had been before."""
        if sequence not in self.running:
            return False
        page, table = self.blocks.page, sequence.table
        first = sequence.computed // page
        copy = first < len(table) and self.blocks.shared(table[first])
        missing = -(-(sequence.computed + count) // page) - len(table)
        while self.blocks.available < missing + copy:
            last = max(self.running, key=lambda s: s.rank)
            self._preempt(last)
            if last is sequence:
                return False
            copy = copy and self.blocks.shared(table[first])
        if copy:
            own = self.blocks.take()
            self.runner.copy(table[first], own)
            self.blocks.release([table[first]])
            table[first] = own
        table += [self.blocks.take() for _ in range(missing)]
        return True

    def _branch(self, sequence: Active) -> None:
        """Pages for the paths behind the first, of those that nobody needs in this pass."""
        page, kept = self.blocks.page, sequence.guesses.paths[:1]
        first, held = divmod(sequence.computed, page)
        for path in sequence.guesses.paths[1:]:
            need = -(-(held + 1 + len(path.tokens)) // page)
            if need > self.blocks.available:
                continue
            path.pages = [self.blocks.take() for _ in range(need)]
            if held:
                self.runner.copy(sequence.table[first], path.pages[0])
            kept.append(path)
        sequence.guesses.keep(kept)

    def _preempt(self, sequence: Active) -> None:
        self.preemptions += 1
        self._drop(sequence)
        self.running.remove(sequence)
        self.add(sequence)

    def _drop(self, sequence: Active) -> None:
        self.runner.end(sequence.name)
        self.blocks.release(sequence.table)
        sequence.table, sequence.keys, sequence.computed = [], [], 0
        sequence.guesses = Guesses([])
