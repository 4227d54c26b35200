"""The harness: a model, some tasks, scores with their uncertainty.

    evaluate(model, tokenizer, [ARC(name="arc", rows=Examples(path="arc.jsonl"))])

Every answer is kept with its question; what was answered before by the same model is not asked
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.files import StrPath, write_json
from treadle.core.progress import Progress, Silent
from treadle.core.results import Figure
from treadle.evals.store import Store, fingerprint, item_key
from treadle.evals.task import Benchmark, Item, Record, Subject
from treadle.inference.engine import EngineConfig
from treadle.models.decoder import DecoderModel
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="ev.harness",
    paper="Gao et al. 2021, lm-evaluation-harness; Biderman et al. 2024, arXiv:2405.14782",
    summary="Multiple choice, generation and perplexity tasks with shots, intervals and a cache.",
    recipe="treadle eval smollm2-135m-instruct --like standard-benchmarks",
    oracle="tests/evals/test_evals_harness.py::test_multiple_choice_matches_lm_eval",
)


@dataclass(frozen=True)
class TaskResult:
    """Scores by metric, over all items and within each group."""

    scores: Mapping[str, Figure]
    groups: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    answered: int = 0
    """Items answered now; the others were on record."""


@dataclass(frozen=True)
class Results:
    """The outcome of an evaluation."""

    model: str
    """The model's fingerprint."""
    tasks: Mapping[str, TaskResult]

    def plain(self) -> dict[str, Any]:
        """As JSON values: tasks -> name -> scores -> metric -> value, n, low, high."""
        return asdict(self)

    def by_name(self) -> dict[str, Figure]:
        """`arc acc_norm`, `gsm8k strict`, ... to their figures over all items."""
        named = ((name, result.scores) for name, result in self.tasks.items())
        return {f"{name} {metric}": s for name, scores in named for metric, s in scores.items()}

    def save(self, path: StrPath) -> None:
        write_json(path, self.plain())


def evaluate(
    model: DecoderModel,
    tokenizer: Tokenizer,
    tasks: Sequence[Benchmark],
    *,
    records: StrPath | None = None,
    tokens: int = 4096,
    engine: EngineConfig = EngineConfig(),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    progress: Progress = Silent(),
) -> Results:
    """Put every task to the model.

    Args:
        records: a folder that keeps the answers and spares them the next time.
        tokens: how many to compute in one pass.

    Raises:
        TreadleError: two tasks of one name, or a task without rows.
    """
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TreadleError(f"two tasks are called `{min(twice)}`: give one another `name`")
    subject = Subject(model, tokenizer, tokens, engine, autocast)
    training = model.training
    model.eval()
    try:
        mark = fingerprint(subject)
        folder = None if records is None else Path(records) / mark
        results = {task.name: _evaluate(subject, task, mark, folder, progress) for task in tasks}
    finally:
        model.train(training)
    return Results(mark, results)


def _evaluate(
    subject: Subject, task: Benchmark, mark: str, folder: Path | None, progress: Progress
) -> TaskResult:
    items = task.items()
    if not items:
        raise TreadleError(f"task `{task.name}` has no rows: check where its `rows` come from")
    keys = [item_key(mark, task, item) for item in items]
    store = Store(None if folder is None else folder / f"{task.name}.jsonl")
    asked = {k: item for k, item in zip(keys, items, strict=True) if k not in store.records}
    by_index = {item.index: key for key, item in asked.items()}
    answered = 0
    with progress.task(task.name, len(items)) as bar:

        def done(item: Item, record: Record) -> None:
            nonlocal answered
            answered += 1
            store.add(by_index[item.index], item, record)
            bar.update(len(items) - len(asked) + answered)

        try:
            task.run(subject, list(asked.values()), done)
        finally:
            store.close()
    found = [store.records[key] for key in keys]
    groups: dict[str, list[Record]] = {}
    for item, record in zip(items, found, strict=True):
        groups.setdefault(item.group, []).append(record)
    return TaskResult(
        scores=task.summarise(found),
        groups={g: task.summarise(r) for g, r in sorted(groups.items()) if g},
        answered=answered,
    )
