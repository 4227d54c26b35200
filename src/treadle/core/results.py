"""What steps record for each other and for reports: plain data, one shape in every room.

`Step.execute` returns the `metrics` of its manifest. A `kind` says which of these shapes they have:

    train        TrainMetrics        and a file of JSON lines, one a training step
    evaluation   EvaluationMetrics   and samples.jsonl, one `Sample` for every scored problem
    reasoning    ReasoningMetrics

Metrics of other kinds are free: a report lists them as they are. What was not measured is left
out or None; a report then says that it is not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from treadle.core.errors import FileFormatError
from treadle.core.files import write_text

TRAIN, EVALUATION, REASONING = "train", "evaluation", "reasoning"
SAMPLES = "samples.jsonl"
OVERALL = "overall"
"""Name of the result over the problems of all task families."""
Z95 = 1.959963984540054
"""Two-sided 95% of the normal distribution."""

Unit = Literal["accuracy", "score", "perplexity", "bits/byte", "tokens", "nats"]
"""accuracy: share of problems answered right, 0 to 1, or the mean of scores in that range;
score: any other number of which more is better; perplexity: exp of the mean negative
log-probability of a token; bits/byte: the same in bits, over the bytes of the text, so that
different tokenizers compare; tokens: a length; nats: a distance between distributions. Of the last
two neither more nor less is better by itself."""


class Figure(TypedDict):
    """A measured number."""

    value: float
    low: float | None
    """Lower end of its 95% interval; None where nobody computed one."""
    high: float | None
    n: int
    """Problems, tokens or documents that it was measured on."""
    unit: Unit


class TrainMetrics(TypedDict):
    """What a training step records."""

    kind: Literal["train"]
    metrics_file: str
    """JSON lines in the step's folder: `step` and any further numbers by name, such as `loss`,
    `lr`, `grad_norm`, `tokens`, `seconds`, `reward`, `kl`, `mismatch`, `completion_tokens`."""
    loss: float
    steps: int
    tokens: int
    parameters: int
    parameters_trained: int
    precision: NotRequired[str]
    skipped_steps: NotRequired[int]


class EvaluationMetrics(TypedDict):
    """What an evaluation step records."""

    kind: Literal["evaluation"]
    subject: str
    """Name of the step that made what was measured; `base`, or any other word, if none did."""
    baseline: NotRequired[bool]
    """It is there to compare with, and no stage on the way to the final model."""
    results: dict[str, Figure]
    """By task family (`chain_sum`) or text; `OVERALL` for all problems together."""
    tokens_per_second: float | None
    """Tokens generated a second."""
    size_bytes: int | None
    """Of the model on disk."""
    parameters: NotRequired[int]


class Reasoned(TypedDict):
    """What a way to come to an answer came to on an exam."""

    strategy: str
    exam: str
    accuracy: Figure
    tokens: float
    """Generated for a question on average."""
    seconds: float
    overflows: int
    """Conversations that filled the context."""


class ReasoningMetrics(TypedDict):
    """What a step records that lets a model answer in several ways."""

    kind: Literal["reasoning"]
    rows: list[Reasoned]


class Sample(TypedDict):
    """A problem, what was answered, and how good that was."""

    problem: str
    """Names the problem: the same in every evaluation of the run."""
    task: str
    """Its task family: a key of `results`."""
    prompt: str
    answer: str
    expected: str
    score: float
    """0 to 1; 1 is right."""


def accuracy(scores: Sequence[float]) -> Figure:
    """Mean of scores in [0, 1], with its Wilson interval."""
    return _proportion(math.fsum(scores), len(scores))


def pooled(figures: Iterable[Figure]) -> Figure:
    """The accuracy over the problems of several task families, each problem counting alike."""
    parts = list(figures)
    return _proportion(math.fsum(f["value"] * f["n"] for f in parts), sum(f["n"] for f in parts))


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval of a proportion, Wilson 1927.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = right / n

    For partial scores in [0, 1] it is on the safe side: their variance is at most p(1-p).
    """
    if n == 0:
        return 0.0, 1.0
    p, square = right / n, Z95 * Z95
    middle = p + square / (2 * n)
    half = Z95 * math.sqrt(max(p * (1 - p), 0.0) / n + square / (4 * n * n))
    low, high = (middle - half) / (1 + square / n), (middle + half) / (1 + square / n)
    return max(low, 0.0), min(high, 1.0)


def _proportion(right: float, n: int) -> Figure:
    low, high = wilson(right, n)
    value = right / n if n else math.nan
    return {"value": value, "low": low, "high": high, "n": n, "unit": "accuracy"}


def write_samples(folder: Path, rows: Iterable[Sample]) -> None:
    """Write `SAMPLES` into a step's folder."""
    lines = (json.dumps(row) + "\n" for row in rows)  # in ASCII: a model may write half a pair
    write_text(folder / SAMPLES, "".join(lines))


def read_samples(folder: Path) -> list[Sample]:
    """The samples of an evaluation; none where it wrote none.

    Raises:
        FileFormatError: a line is no sample.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return []
    rows: list[Sample] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows.append(Sample(**{name: row[name] for name in Sample.__annotations__}))  # type: ignore[typeddict-item]
            except (ValueError, KeyError, TypeError) as error:
                raise FileFormatError(f"{path}:{number}: not a sample: {error}") from None
    return rows
