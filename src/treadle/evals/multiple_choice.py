"""Multiple choice: the answer is the choice that the model finds likeliest.

acc        argmax_i  log p(choice_i | context)
acc_norm   argmax_i  log p(choice_i | context) / characters of choice_i
acc_bytes  the same, divided by bytes in UTF-8
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treadle.core.errors import TreadleError
from treadle.core.results import Figure
from treadle.evals.likelihood import encode_pairs, log_likelihoods, packs
from treadle.evals.rows import Examples, Row
from treadle.evals.shots import Shots, before
from treadle.evals.task import Benchmark, Done, Item, Record, Subject, shares


@dataclass(frozen=True)
class Question:
    """A row as a question; `continuations[i]` is scored after `contexts[i]`."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    """The choices alone, by whose length `acc_norm` divides."""
    gold: int
    group: str = ""
    header: str = ""
    """Said once, before shots and question."""

    def solved(self) -> str:
        """The question with its answer, as a shot."""
        return self.contexts[self.gold] + self.continuations[self.gold]


def ask(
    context: str, choices: Sequence[str], gold: int, *, group: str = "", header: str = ""
) -> Question:
    """One context with several continuations, joined by a space."""
    if not 0 <= gold < len(choices):
        raise TreadleError(f"answer {gold} is none of {len(choices)} choices: {context[:60]!r}")
    return Question(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        choices=tuple(choices),
        gold=gold,
        group=group,
        header=header,
    )


@dataclass(frozen=True)
class ChoiceItem(Item):
    """Contexts with shots and header before them."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class MultipleChoice(Benchmark):
    """A shape: a benchmark whose rows have choices."""

    rows: Examples
    shots: Shots | None = None

    @abstractmethod
    def question(self, row: Row) -> Question:
        """A row as a question."""

    def items(self) -> Sequence[ChoiceItem]:
        pools: dict[str, list[str]] = {}
        for row in self.shots.rows.open() if self.shots else ():
            shot = self.question(row)
            pools.setdefault(shot.group, []).append(shot.solved())
        items = []
        for index, row in enumerate(self.rows.take(self.limit)):
            asked = self.question(row)
            pool = pools.get(asked.group, ())
            shots = asked.header + before(self.shots, pool, index, asked.solved())
            contexts = tuple(shots + context for context in asked.contexts)
            items.append(
                ChoiceItem(
                    index, asked.group, contexts, asked.continuations, asked.choices, asked.gold
                )
            )
        return items

    def run(self, subject: Subject, items: Sequence[Item], done: Done) -> None:
        asked = [item for item in items if isinstance(item, ChoiceItem)]
        pairs = [p for i in asked for p in zip(i.contexts, i.continuations, strict=True)]
        context = subject.model.config.context
        scored = iter([s.cut(context) for s in encode_pairs(subject.tokenizer, pairs)])
        groups = [[next(scored) for _ in item.choices] for item in asked]
        for pack in packs(groups, subject.tokens):
            with subject.autocast():
                found = iter(log_likelihoods(subject.model, [s for g in pack for s in groups[g]]))
            for g in pack:
                done(asked[g], judge(asked[g], [next(found) for _ in groups[g]]))

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return shares(records)


def judge(item: ChoiceItem, log_likelihoods: Sequence[float]) -> Record:
    """Which choice is likeliest, by each of three measures."""
    found = np.asarray(log_likelihoods)
    characters = np.array([max(1, len(choice)) for choice in item.choices])
    size = np.array([max(1, len(choice.encode())) for choice in item.choices])
    picked = {
        "acc": int(np.argmax(found)),
        "acc_norm": int(np.argmax(found / characters)),
        "acc_bytes": int(np.argmax(found / size)),
    }
    return Record(
        output={"log_likelihoods": list(log_likelihoods), "picked": picked},
        metrics={name: float(choice == item.gold) for name, choice in picked.items()},
    )
