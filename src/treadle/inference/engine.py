"""The one generation engine: chat, evaluation, rollouts and the server all call it.

A step is schedule -> run -> sample -> postprocess. The scheduler decides which tokens run, a
runner computes them, and what ends makes room at once, so unequal lengths cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path

import torch

from treadle.core.config import to_yaml
from treadle.core.errors import ConfigError, TreadleError, did_you_mean
from treadle.inference.blocks import Blocks
from treadle.inference.detokenizer import Detokenizer
from treadle.inference.draw import draw
from treadle.inference.guesses import Guesses
from treadle.inference.limits import EngineConfig as EngineConfig
from treadle.inference.paged_memory import pages_for
from treadle.inference.planned import batch_of
from treadle.inference.prefix_folder import PrefixFolder, fingerprint
from treadle.inference.read import read
from treadle.inference.request import Completion, Delta, Request
from treadle.inference.runner import Runner
from treadle.inference.scheduler import QueueFullError, Scheduler
from treadle.inference.sequence import Active
from treadle.inference.speculative import Guesser
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer


class Engine:
    """Continues prompts with a model. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        config: EngineConfig = EngineConfig(),
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        pages = pages_for(model, config.slots, config.cache_tokens)
        cache = config.cache or config.decode.cache(model)
        runner = TorchRunner(
            model, pages=pages, cache=cache, autocast=autocast, decode=config.decode
        )
        kept = to_yaml(cache)
        mark = fingerprint(model, runner.page, autocast, kept) if config.prefix_folder else ""
        self._open(runner, tokenizer, config, mark)

    @classmethod
    def of_runner(
        cls,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig = EngineConfig(),
        *,
        mark: str = "",
    ) -> Engine:
        """An engine over a runner that exists; its pages bound the cache.

        `mark` names the weights, the precision and the page size: see `fingerprint`.
        """
        engine = cls.__new__(cls)
        engine._open(runner, tokenizer, config, mark)
        return engine

    def _open(self, runner: Runner, tokenizer: Tokenizer, config: EngineConfig, mark: str) -> None:
        folder = None
        if config.prefix_folder is not None:
            if not mark:
                raise TreadleError(
                    "EngineConfig.prefix_folder keeps pages by the model's fingerprint: "
                    "give it to Engine.of_runner as `mark`"
                )
            limit = int(config.prefix_gigabytes * 1e9)
            folder = PrefixFolder(Path(config.prefix_folder), mark, limit)
        if not runner.lasting:
            for name, given in (("prefix_folder", folder), ("draft", config.draft)):
                if given is not None:
                    raise ConfigError(
                        f"EngineConfig.{name} needs pages that last: leave it out, or use a cache "
                        "of kind Paged or Quantised"
                    )
        self.runner, self.tokenizer, self.config = runner, tokenizer, config
        self.scheduler = Scheduler(
            Blocks(runner.pages, runner.page),
            runner,
            slots=config.slots,
            tokens=config.prefill_tokens,
            folder=folder,
        )
        self.jobs = 0
        self.prefilled = 0
        """Prompt tokens that were really computed."""
        self.guesser = config.draft.open(runner, tokenizer) if config.draft is not None else None
        self.guessed = 0
        """Tokens that were guessed ahead and checked."""
        self.accepted = 0
        """Those that were right."""
        self.verified = 0
        """How often a sequence had guesses in a pass; each time it got a token besides them."""

    @property
    def running(self) -> list[Active]:
        """Sequences that hold pages."""
        return self.scheduler.running

    @property
    def waiting(self) -> list[Active]:
        """Sequences that do not: new ones, one for each request, and those that were preempted."""
        return self.scheduler.waiting

    def submit(self, request: Request) -> int:
        """Queue a request; its number names it in what `step` returns.

        Raises:
            TreadleError: an empty prompt, or one that leaves no room in the model's context.
            QueueFullError: `EngineConfig.queue` requests wait already.
        """
        self.check(request)
        if self.config.queue is not None and len(self.waiting) >= self.config.queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait, as many as EngineConfig.queue allows: "
                "try again when some have ended"
            )
        job, self.jobs = self.jobs, self.jobs + 1
        shelf = self.runner.adapters
        mark = b"" if shelf is None else shelf.mark(request.adapter)
        leader, *forks = (
            Active(
                request,
                index,
                job,
                Detokenizer(self.tokenizer, request.sampling.stop),
                constraint=None if request.constraint is None else request.constraint.fork(),
                mark=mark,
            )
            for index in range(request.n)
        )
        leader.forks = forks
        self.scheduler.add(leader)
        return job

    def check(self, request: Request) -> None:
        """Raises TreadleError where the request cannot be run, whatever else runs."""
        if self.runner.refusal:
            raise TreadleError(self.runner.refusal)
        length, context = len(request.prompt), self.runner.context
        if request.adapter is not None:
            known = () if self.runner.adapters is None else self.runner.adapters.names
            if request.adapter not in known:
                hint = did_you_mean(request.adapter, known)
                raise TreadleError(f"no adapter `{request.adapter}`{hint}")
        if not length:
            raise TreadleError("the prompt is empty: give at least one token")
        if request.prompt_logprobs is not None:
            if not 0 <= request.prompt_logprobs <= self.runner.vocab:
                raise TreadleError(
                    f"prompt_logprobs={request.prompt_logprobs}: tokens are at least 0 and at most "
                    f"the vocabulary of {self.runner.vocab}"
                )
            if not self.runner.lasting:
                raise TreadleError(
                    "prompt_logprobs need a cache that keeps whole prompts: use one of kind Paged "
                    "or Quantised"
                )
        if length >= context:
            raise TreadleError(
                f"the prompt has {length} tokens, but the model's context is {context}: "
                "shorten the prompt"
            )
        if request.n > self.config.slots:
            raise TreadleError(
                f"n={request.n} completions need as many slots, but EngineConfig.slots is "
                f"{self.config.slots}: raise it, or ask for fewer"
            )
        most, room = length + request.limit(context), self.runner.pages * self.runner.page
        if most > room:
            raise TreadleError(
                f"prompt and answer may take {most} tokens, but the cache holds {room}: raise "
                "EngineConfig.cache_tokens, or lower max_tokens"
            )

    def cancel(self, job: int) -> None:
        """End a request's completions as they are; they come out of the next `step`."""
        for sequence in (*self.running, *self.waiting):
            if sequence.job == job:
                for member in (sequence, *sequence.forks):
                    member.end("cancelled")

    def forget(self) -> None:
        """Drop all that was computed: to be called when the model's weights have changed.

        What is under way goes on from its tokens under the new weights.
        """
        self.scheduler.forget()
        if self.guesser is not None:
            self.guesser.forget()

    @torch.inference_mode()
    def step(self) -> list[Active]:
        """Run one pass and return the sequences that were touched, finished ones too."""
        cancelled = self.scheduler.reap()
        if self.guesser is not None:
            self._guess(self.guesser)
        plan = self.scheduler.schedule()
        if not plan:
            return cancelled
        try:
            drawing = self._pass(plan)
        finally:
            self.scheduler.settle(plan)
        self.scheduler.reap()
        return [*cancelled, *drawing]

    def _pass(self, plan: list[tuple[Active, int]]) -> list[Active]:
        """Run what is planned; the sequences that got tokens."""
        batch = batch_of(plan, self.scheduler.blocks.page)
        logits = self.runner.run(batch)
        ends = list(accumulate(batch.outputs[: len(plan)]))
        for (sequence, _), end, count in zip(plan, ends, batch.outputs[: len(plan)], strict=True):
            if sequence.reads:
                read(sequence, logits[end - count : end])
        self.prefilled += sum(count for sequence, count in plan if not sequence.tokens)
        self.scheduler.commit(plan)
        drawing, rows = [], []
        for (sequence, _), end in zip(plan, ends, strict=True):
            if not sequence.pending:
                members = [sequence, *self.scheduler.part(sequence)]
                drawing += members
                rows += [end - 1 - len(sequence.guesses.trunk)] * len(members)
        stops, peaks = self.tokenizer.stop_ids, self.runner.peaks
        rows = draw(drawing, rows, logits, stops, self.runner.context, peaks)
        if self.guesser is not None:
            self.guesser.saw(drawing, rows)
        for guesses in (sequence.guesses for sequence, _ in plan if sequence.guesses.paths):
            self.guessed += guesses.checked
            self.accepted += guesses.right
            self.verified += 1
        return drawing

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[list[Completion]]:
        """Complete all requests; the answer has a list of n completions for each, in order.

        `progress(finished, total)` is called as completions end.
        """
        for request in requests:
            self.check(request)
        queue = deque(enumerate(requests))
        total = sum(r.n for r in requests)
        places: dict[int, int] = {}
        done: dict[tuple[int, int], Completion] = {}
        while len(done) < total:
            while queue and len(self.waiting) < (self.config.queue or len(requests)):
                place, request = queue.popleft()
                places[self.submit(request)] = place
            before = len(done)
            for sequence in self.step():
                if sequence.finish is not None and sequence.job in places:
                    done[places[sequence.job], sequence.index] = sequence.completion()
            if progress is not None and len(done) > before:
                progress(len(done), total)
        return [[done[place, i] for i in range(r.n)] for place, r in enumerate(requests)]

    def stream(self, request: Request) -> Iterator[Delta]:
        """The pieces of one completion as they come. Closing the iterator cancels it."""
        assert request.n == 1, "a stream has one completion"
        job = self.submit(request)
        sent = 0
        try:
            while True:
                for sequence in self.step():
                    if sequence.job != job:
                        continue
                    final = sequence.finish is not None
                    piece = sequence.text.take(final=final)
                    if piece or final:
                        new, sent = tuple(sequence.tokens[sent:]), len(sequence.tokens)
                        yield Delta(piece, new, sequence.completion() if final else None)
                    if final:
                        return
        finally:
            self.cancel(job)
            self.scheduler.reap()

    def _guess(self, guesser: Guesser) -> None:
        ready = [s for s in self.running if s.tokens and s.pending == 1]
        rooms = [s.request.limit(self.runner.context) - len(s.tokens) - 1 for s in ready]
        for sequence, paths in zip(ready, guesser.guess(ready, rooms), strict=True):
            sequence.guesses = Guesses.of(paths)
