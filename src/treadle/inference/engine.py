"""The one generation engine: chat, evaluation, rollouts and the server all call it.

A step is schedule -> run -> sample -> postprocess. New prompts are admitted while there are
slots, several in one flat pass without padding; then all running sequences advance by a token.
A sequence that ends frees its slot at once, so unequal lengths cost nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.cache import Decode, KVCache, Prefill
from treadle.inference.constraint import Guide
from treadle.inference.detokenizer import Detokenizer
from treadle.inference.request import Completion, Delta, Finish, Request, TopLogprobs
from treadle.inference.sampling import sample
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer


class EngineConfig(Config):
    """Limits of the engine."""

    slots: int = 64
    """Sequences that run at once."""
    prefill_tokens: int = 4096
    """Prompt tokens computed in one pass."""


@dataclass(eq=False)
class Active:
    """One completion under way."""

    request: Request
    index: int
    """Which of the request's n."""
    job: int
    text: Detokenizer
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    """For each token the likeliest of its step, where the request asks for them."""
    guide: Guide | None = None
    finish: Finish | None = None


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
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.autocast = autocast
        self.cache = KVCache(model, config.slots)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: list[Active] = []
        self.jobs = 0

    def submit(self, request: Request) -> int:
        """Queue a request; its number names it in what `step` returns.

        Raises:
            TreadleError: an empty prompt, one that leaves no room in the model's context, or a
                constraint that is not valid.
        """
        room = self.model.config.context - len(request.prompt)
        if not request.prompt:
            raise TreadleError("the prompt is empty: give at least one token")
        if room < 1:
            raise TreadleError(
                f"the prompt has {len(request.prompt)} tokens, but the model's context is "
                f"{self.model.config.context}: shorten the prompt"
            )
        if request.n > self.config.slots:
            raise TreadleError(
                f"n={request.n} completions need as many slots, but EngineConfig.slots is "
                f"{self.config.slots}: raise it, or ask for fewer"
            )
        self._guide(request)
        job, self.jobs = self.jobs, self.jobs + 1
        self.waiting.append((job, request))
        return job

    def cancel(self, job: int) -> None:
        """End a request's completions as they are; they come out of the next `step`."""
        self.waiting = deque(item for item in self.waiting if item[0] != job)
        for sequence in self.running:
            if sequence.job == job and sequence.finish is None:
                sequence.finish = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Active]:
        """Advance by one token and return the sequences that were touched, finished ones too."""
        self._retire()
        return self._admit() or self._decode()

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[list[Completion]]:
        """Complete all requests; the answer has a list of n completions for each, in order.

        `progress(finished, total)` is called as completions end.
        """
        first = self.jobs
        for request in requests:
            self.submit(request)
        total = sum(r.n for r in requests)
        done: dict[tuple[int, int], Completion] = {}
        while len(done) < total:
            before = len(done)
            for sequence in self.step():
                if sequence.finish is not None:
                    done[sequence.job - first, sequence.index] = _completion(sequence)
            if progress is not None and len(done) > before:
                progress(len(done), total)
        self._retire()
        return [[done[job, i] for i in range(r.n)] for job, r in enumerate(requests)]

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
                        yield Delta(piece, new, _completion(sequence) if final else None)
                    if final:
                        return
        finally:
            self.cancel(job)
            self._retire()

    def _admit(self) -> list[Active]:
        """Prefill waiting requests while there are slots and the pass has room."""
        batch: list[tuple[int, Request]] = []
        slots, tokens = len(self.running), 0
        while self.waiting:
            request = self.waiting[0][1]
            full = slots + request.n > self.config.slots
            if full or (batch and tokens + len(request.prompt) > self.config.prefill_tokens):
                break
            batch.append(self.waiting.popleft())
            slots, tokens = slots + request.n, tokens + len(request.prompt)
        if not batch:
            return []
        sources: list[int] = []
        admitted: list[Active] = []
        for job, request in batch:
            sources.append(len(self.running))
            for index in range(request.n):
                text = Detokenizer(self.tokenizer, request.sampling.stop)
                sequence = Active(request, index, job, text, guide=self._guide(request))
                self.running.append(sequence)
                admitted.append(sequence)
        prompts = [request.prompt for _, request in batch]
        context = Prefill.of(self.cache, sources, [len(p) for p in prompts])
        flat = torch.tensor([t for p in prompts for t in p], device=self.cache.device)
        ends = torch.tensor([len(p) for p in prompts]).cumsum(0) - 1
        with self.autocast():
            hidden = self.model(flat, context)[ends]
            logits = self.model.logits(hidden)
        for source, (_, request) in zip(sources, batch, strict=True):
            self.cache.copy(source, list(range(source + 1, source + request.n)))
        copies = torch.tensor([r.n for _, r in batch])
        self._sample(admitted, logits.repeat_interleave(copies.to(logits.device), 0))
        return admitted

    def _decode(self) -> list[Active]:
        """One token for every running sequence."""
        if not self.running:
            return []
        last = torch.tensor([s.tokens[-1] for s in self.running], device=self.cache.device)
        context = Decode.of(self.cache, len(self.running))
        with self.autocast():
            logits = self.model.logits(self.model(last, context))
        self._sample(self.running, logits)
        return list(self.running)

    def _sample(self, sequences: list[Active], logits: Tensor) -> None:
        draw = sample(
            logits,
            [s.request.sampling for s in sequences],
            streams=[s.index for s in sequences],
            steps=[len(s.tokens) for s in sequences],
            seen=self._seen(sequences),
            bias=self._bias(sequences),
            allowed=self._allowed(sequences),
        )
        tokens, logprobs = draw.tokens.tolist(), draw.logprobs.tolist()
        tops = zip(draw.top_tokens.tolist(), draw.top_logprobs.tolist(), strict=True)
        for sequence, token, logprob, top in zip(sequences, tokens, logprobs, tops, strict=True):
            if sequence.finish is not None:
                sequence.text.finish()  # its constraint could not be followed further
                continue
            wanted = sequence.request.sampling.top_logprobs
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.tops.append(tuple(zip(*top, strict=True))[:wanted])
            self._postprocess(sequence, token)

    def _postprocess(self, sequence: Active, token: int) -> None:
        limit = min(
            sequence.request.sampling.max_tokens,
            self.model.config.context - len(sequence.request.prompt),
        )
        if token in self.tokenizer.stop_ids:
            sequence.finish = "stop"
        else:
            sequence.text.push(token)
            if sequence.text.stopped or self._advanced(sequence, token):
                sequence.finish = "stop"
            elif len(sequence.tokens) >= limit:
                sequence.finish = "length"
        if sequence.finish is not None:
            sequence.text.finish()

    def _seen(self, sequences: list[Active]) -> Tensor | None:
        """Tokens of prompt and completion, where a repetition penalty asks for them."""
        if all(s.request.sampling.repetition_penalty == 1.0 for s in sequences):
            return None
        seen = torch.zeros(len(sequences), self.model.config.vocab, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            seen[row, list(sequence.request.prompt) + sequence.tokens] = True
        return seen.to(self.cache.device)

    def _guide(self, request: Request) -> Guide | None:
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        return constraint.build(self.tokenizer, self.model.config.vocab)

    def _advanced(self, sequence: Active, token: int) -> bool:
        """Tell the guide of a token; whether the text is whole with it."""
        if sequence.guide is None:
            return False
        sequence.guide.advance(token)
        return sequence.guide.done

    def _bias(self, sequences: list[Active]) -> Tensor | None:
        """Logit biases, and penalties for what a completion has already."""
        bias = torch.zeros(len(sequences), self.model.config.vocab)
        for row, sequence in enumerate(sequences):
            sampling = sequence.request.sampling
            presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
            if presence or frequency:
                for token, count in Counter(sequence.tokens).items():
                    bias[row, token] -= presence + frequency * count
            for token, value in sampling.logit_bias:
                bias[row, token] += value
        return bias.to(self.cache.device) if bias.any() else None

    def _allowed(self, sequences: list[Active]) -> Tensor | None:
        """Tokens that constraints let come next; a guide that gives up ends its own text only."""
        if all(s.guide is None for s in sequences):
            return None
        allowed = torch.ones(len(sequences), self.model.config.vocab, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            if sequence.guide is not None:
                try:
                    allowed[row] = torch.from_numpy(sequence.guide.mask())
                except TreadleError:
                    sequence.finish = "cancelled"
        return allowed.to(self.cache.device)

    @torch.inference_mode()
    def _retire(self) -> None:
        """Free the slots of finished sequences; the last sequences move down into the gaps."""
        row = 0
        while row < len(self.running):
            if self.running[row].finish is None:
                row += 1
                continue
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                self.cache.copy(len(self.running), [row])


def _completion(sequence: Active) -> Completion:
    assert sequence.finish is not None
    return Completion(
        tokens=tuple(sequence.tokens),
        text=sequence.text.text,
        logprobs=tuple(sequence.logprobs),
        tops=tuple(sequence.tops),
        finish=sequence.finish,
    )
