"""Beam search and diverse beam search.

    score(y) = sum_t log p(y_t | y_<t),     rank of a finished text = score / |y|^alpha

Each step keeps the `width` best continuations. In diverse beam search the beams are divided into
groups that choose one after another; within a step a later group chooses by

    score(y) - lambda * how many beams of earlier groups took the same token now

so that groups part. The penalty steers the choice and is not part of the score.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.branches import Branch, Branches
from treadle.inference.constraint import Constraint
from treadle.inference.detokenizer import Detokenizer
from treadle.inference.engine import Engine
from treadle.inference.penalties import adjust, forbid
from treadle.inference.request import Completion, Finish, Request

CARD = Card(
    id="inf.beam",
    paper="Vijayakumar et al. 2016, Diverse Beam Search, arXiv:1610.02424",
    summary="Beam and diverse beam search over shared pages, with a length penalty.",
    recipe="treadle generate smollm2-135m-instruct 'A loom' --beams 4",
    oracle="tests/inference/test_inference_beam.py::test_matches_transformers",
)


@dataclass(eq=False)
class Hypothesis:
    """A text under way."""

    branch: Branch
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    constraint: Constraint | None = None

    @property
    def score(self) -> float:
        return sum(self.logprobs)


@dataclass(eq=False)
class Group:
    """Beams that choose together, and what they have finished: rank, text, why it ended."""

    beams: list[Hypothesis]
    finished: list[tuple[float, Hypothesis, Finish]] = field(default_factory=list)


class BeamSearch(Config):
    """The best of many continuations kept at once."""

    width: int = Field(4, ge=1)
    """Beams in all."""
    groups: int = Field(1, ge=1)
    """Divides `width`; 1 is plain beam search."""
    diversity: float = Field(0.5, ge=0.0)
    """lambda, the penalty for tokens that earlier groups took."""
    length_penalty: float = 1.0
    """alpha: above 0 longer texts are favoured, below 0 shorter ones."""

    def __call__(self, engine: Engine, request: Request) -> list[Completion]:
        self._check(request)
        engine.check(request)
        branches = Branches(engine.runner, engine.scheduler.blocks, request.adapter)
        root = branches.open(request.prompt)
        groups: list[Group] = []
        try:
            unread = request.prompt[root.length :]
            logits = branches.run([(root, unread, 1)])
            for _ in range(self.groups):
                constraint = None if request.constraint is None else request.constraint.fork()
                beam = Hypothesis(branches.fork(root), constraint=constraint)
                groups.append(Group([beam]))
            logits = logits.expand(len(groups), -1)
            limit = request.limit(engine.runner.context)
            for step in range(1, limit + 1):
                self._step(engine, request, branches, groups, logits, last=step == limit)
                beams = [beam for group in groups for beam in group.beams]
                if not beams or step == limit:
                    break
                logits = branches.run([(b.branch, b.tokens[-1:], 1) for b in beams])
        finally:
            branches.close(root)
            for group in groups:
                for beam in group.beams:
                    branches.close(beam.branch)
        found = [hypothesis for group in groups for hypothesis in group.finished]
        found.sort(key=lambda item: -item[0])
        return [_completion(engine, h, finish) for _, h, finish in found[: request.n]]

    def _check(self, request: Request) -> None:
        if self.width % self.groups:
            raise ConfigError(
                f"BeamSearch: width={self.width} cannot be divided into groups={self.groups} of "
                "one size"
            )
        if request.n > self.width:
            raise TreadleError(
                f"n={request.n} completions need as many beams, but BeamSearch.width is "
                f"{self.width}: raise it, or ask for fewer"
            )
        if request.sampling.temperature not in (0.0, 1.0):
            raise TreadleError("beam search draws nothing: leave the temperature at 0 or 1")
        if request.sampling.stop:
            raise TreadleError("beam search ends at stop tokens: remove the stop strings")

    def _step(
        self,
        engine: Engine,
        request: Request,
        branches: Branches,
        groups: list[Group],
        logits: Float[Tensor, "B V"],
        *,
        last: bool,
    ) -> None:
        """Replace every group's beams by their best continuations."""
        taken: Counter[int] = Counter()
        rows = iter(logits)
        for group in groups:
            if not group.beams:
                continue
            scores = torch.stack(
                [_logprobs(engine, request, beam, next(rows)) for beam in group.beams]
            )
            before, group.beams = group.beams, []
            try:
                chosen = self._choose(engine, group, before, scores, branches, taken, last=last)
            finally:
                for beam in before:
                    branches.close(beam.branch)
            taken.update(chosen)

    def _choose(
        self,
        engine: Engine,
        group: Group,
        before: list[Hypothesis],
        logprobs: Float[Tensor, "B V"],
        branches: Branches,
        taken: Counter[int],
        *,
        last: bool,
    ) -> list[int]:
        """Fill the group anew; the tokens by which its texts go on."""
        width, stops = self.width // self.groups, engine.tokenizer.stop_ids
        choice = logprobs + torch.tensor([[b.score] for b in before], device=logprobs.device)
        for token, times in taken.items():
            choice[:, token] -= self.diversity * times
        # Each beam can end in each stop token, and as many that go on are still wanted.
        chosen: list[int] = []
        best = choice.flatten().topk(min(choice.numel(), width * (1 + max(1, len(stops)))))
        for rank, (value, at) in enumerate(zip(*(t.tolist() for t in best), strict=True)):
            row, token = divmod(at, logprobs.shape[1])
            if value == float("-inf") or len(group.beams) == width:
                break
            parent = before[row]
            tokens = (*parent.tokens, token)
            logps = (*parent.logprobs, float(logprobs[row, token]))
            ended = token in stops
            if not ended and len(chosen) < width:
                chosen.append(token)
            if ended or last:
                # What lies below the best `width` is not good enough to be an end.
                if rank < width:
                    text = Hypothesis(Branch([]), tokens, logps)
                    rank_of = text.score / len(tokens) ** self.length_penalty
                    group.finished.append((rank_of, text, "stop" if ended else "length"))
                continue
            constraint = None if parent.constraint is None else parent.constraint.fork()
            if constraint is not None:
                constraint.advance(token)
            group.beams.append(Hypothesis(branches.fork(parent.branch), tokens, logps, constraint))
        group.finished = sorted(group.finished, key=lambda item: -item[0])[:width]
        if group.beams and len(group.finished) == width:
            hope = group.beams[0].score / len(group.beams[0].tokens) ** self.length_penalty
            if hope <= group.finished[-1][0]:
                for beam in group.beams:
                    branches.close(beam.branch)
                group.beams = []
        return chosen


def _logprobs(
    engine: Engine, request: Request, beam: Hypothesis, logits: Float[Tensor, " V"]
) -> Float[Tensor, " V"]:
    """Log-probabilities of the next token, with the request's penalties and the beam's mask."""
    row = logits.clone()
    stops = engine.tokenizer.stop_ids
    adjust(row, request.sampling, request.prompt, beam.tokens, stops)
    allowed = beam.constraint.mask() if beam.constraint is not None else None
    if allowed is not None:
        forbid(row, allowed)
    return row.log_softmax(-1)


def _completion(engine: Engine, text: Hypothesis, finish: Finish) -> Completion:
    writer = Detokenizer(engine.tokenizer, ())
    for token in text.tokens:
        if token not in engine.tokenizer.stop_ids:
            writer.push(token)
    writer.finish()
    return Completion(tokens=text.tokens, text=writer.text, logprobs=text.logprobs, finish=finish)
