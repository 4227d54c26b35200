"""Rejection sampling as a step: a model's accepted answers become conversations in a file.

    D = {(x, y) : y ~ pi(.|x), r(x, y) >= threshold}

Expert iteration (`accepted.py`) learns its answers as they come; here they stay on the disk, so
that another model can learn them, among data of other kinds (DeepSeek-R1, arXiv:2501.12948,
section 2.3.3: the base model is trained anew on what the reinforced one wrote).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field

from treadle.alignment.rollouts import Group, Rollouts
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.files import write_json, write_text
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.data.conversations import ConversationFiles
from treadle.data.records import Chat
from treadle.data.source import Env, Source, Stream
from treadle.data.supervised import Conversations, Supervised
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="al.r1",
    paper="Guo et al. 2025, DeepSeek-R1, arXiv:2501.12948",
    summary="Cold start, GRPO, rejection sampling, SFT on accepted and general data, final RL.",
    recipe="treadle run r1",
    oracle="tests/alignment/test_alignment_rejection.py::test_only_what_the_verifier_accepts_is_kept",
)
ACCEPTED = "accepted.jsonl"


class RejectionSample(Step):
    """Let a model answer problems, and write down what a verifier accepts.

    Finished rounds survive an interruption.
    """

    model: ModelSource
    rollouts: Rollouts
    """What is sampled in a round: its prompts, completions, sampling and reward."""
    rounds: int = Field(4, ge=1)
    threshold: float = 1.0
    """Least reward of an accepted answer."""
    keep: int = Field(2, ge=1)
    """Different accepted answers that are kept for each problem at the most."""
    precision: Precision = Auto()
    seed: int = 0

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model, precision = opened.model.requires_grad_(False), self.precision.resolve("cpu")
        precision.prepare(model)
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            seed=self.seed,
            autocast=partial(precision.autocast, "cpu"),
            workspace=workspace,
        )
        stream = self.rollouts.open(env)
        rounds: list[dict[str, Any]] = []
        with workspace.progress.task(self.name, self.rounds) as task:
            for number in range(self.rounds):
                path = workspace.folder / f"round-{number}.json"
                if not path.is_file():
                    stream.drawn = number * self.rollouts.prompts
                    write_json(path, self._round(stream.roll()))
                rounds.append(json.loads(path.read_text(encoding="utf-8")))
                task.update(number + 1)
        rows = [row for found in rounds for row in found["rows"]]
        if not rows:
            raise TreadleError(
                f"step `{self.name}` accepted none of {self.rounds * self.rollouts.prompts} "
                f"problems' answers (threshold {self.threshold:g}): choose easier problems, "
                "sample more, or train the model on solutions first"
            )
        write_text(workspace.folder / ACCEPTED, "".join(json.dumps(row) + "\n" for row in rows))
        totals = {k: sum(r[k] for r in rounds) for k in ("sampled", "accepted", "asked", "solved")}
        return {"kind": "rejection", "kept": len(rows), **totals}

    def _round(self, groups: list[Group]) -> dict[str, Any]:
        found = [accepted_texts(group, self.threshold) for group in groups]
        rows = [
            _row(group, text)
            for group, texts in zip(groups, found, strict=True)
            for text in list(dict.fromkeys(texts))[: self.keep]
        ]
        return {
            "rows": rows,
            "sampled": sum(len(g.completions) for g in groups),
            "accepted": sum(map(len, found)),
            "asked": len(groups),
            "solved": sum(map(bool, found)),
        }


def accepted_texts(group: Group, threshold: float) -> list[str]:
    """Texts of a group that ended by themselves and reached the threshold, in order."""
    return [
        completion.text.strip()
        for completion, scored in zip(group.completions, group.scores, strict=True)
        if not scored.failure
        and scored.value >= threshold
        and completion.finish == "stop"
        and completion.text.strip()
    ]


def _row(group: Group, text: str) -> dict[str, Any]:
    prompt = [m.plain() for m in group.problem.prompt]
    return {"messages": [*prompt, {"role": "assistant", "content": text}]}


class Sampled(Reads):
    """The accepted answers of an earlier `RejectionSample`."""

    def conversations(self, workspace: Workspace) -> ConversationFiles:
        return ConversationFiles(path=str(workspace.output(self.step) / ACCEPTED))


class SampledAndGeneral(Source):
    """Supervised learning on accepted answers of earlier steps, and on general conversations.

    What there is of each is learned in a shuffled order, once in every epoch.
    """

    sampled: tuple[Sampled, ...] = Field(min_length=1)
    general: tuple[ConversationFiles, ...] = ()
    """Files of one's own."""
    per_step: int = Field(16, ge=1)
    tokens: int = Field(2048, ge=8)
    longest: int = Field(1024, ge=2)

    def open(self, env: Env) -> Stream:
        if env.workspace is None:
            raise TreadleError("SampledAndGeneral reads earlier steps: give Env a workspace")
        read = tuple(s.conversations(env.workspace) for s in self.sampled)
        return Supervised(
            conversations=JoinedConversations(of=(*read, *self.general)),
            per_step=self.per_step,
            tokens=self.tokens,
            longest=self.longest,
        ).open(env)


class JoinedConversations(Conversations):
    """Some conversations after others; all but the last must end."""

    of: tuple[Conversations, ...] = Field(min_length=1)

    def conversation(self, index: int) -> Chat:
        for part in self.of[:-1]:
            count = part.count()
            if count is None:
                raise TreadleError(
                    f"JoinedConversations: {type(part).__name__} never ends: put it last"
                )
            if index < count:
                return part.conversation(index)
            index -= count
        return self.of[-1].conversation(index)

    def count(self) -> int | None:
        counts = [part.count() for part in self.of]
        return None if None in counts else sum(c for c in counts if c is not None)
