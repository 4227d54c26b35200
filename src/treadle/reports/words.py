"""The result in words: sentences that a reader can quote, each from figures of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.core.results import Figure
from treadle.reports import numbers
from treadle.reports.stages import (
    Comparison,
    Stage,
    headline,
    measured_of,
    path_of,
    problems_of,
    ways_of,
)

LESS_IS_BETTER = ("perplexity", "bits/byte")
"""Units."""
STATES = {
    "interrupted": "was interrupted",
    "begun": "has begun and is not done",
    "outdated": "was done with another configuration and has to run again",
    "not run": "has not run",
}


def sentences(
    name: str,
    stages: Sequence[Stage],
    comparison: Comparison | None,
    steps: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
    reasoning: Sequence[Mapping[str, Any]],
    spread: Mapping[str, Any] | None = None,
) -> list[str]:
    """What came of the run, what it cost, and what is not there yet."""
    if spread is not None:
        return [*_seeded(spread), *_cost(steps), *_missing(steps)]
    ways = ways_of(stages)
    if len(ways) > 1 or any(s["kind"] == "SideBySide" for s in steps):
        return [*_start(ways), *order(stages), *_cost(steps), *_missing(steps)]
    path = path_of(stages)
    finished = all(s["state"] == "done" for s in steps)
    said = _accuracy(path, comparison, "The final model" if finished else "The last model so far")
    for unit, what in (("perplexity", "Perplexity"), ("bits/byte", "Bits per byte")):
        said += _text(stages, unit, what)
    said += [line for step in reasoning for line in _ways(step)]
    if not said:
        said = _losses(training) or [f"Nothing of {name} has been measured yet."]
    return [*said, *_cost(steps), *_missing(steps)]


def _start(ways: Sequence[Stage]) -> list[str]:
    """What alternatives have in common."""
    shared = [n for n in ways[0].made_from if all(n in w.made_from for w in ways)] if ways else []
    if len(ways) < 2 or not shared:
        return []
    *others, last = (w.subject for w in ways)
    return [f"{', '.join(others)} and {last} are alternatives: each starts from {shared[-1]}."]


def _seeded(spread: Mapping[str, Any]) -> list[str]:
    """Methods over seeds, and which gained more than their seeds differ."""
    rows = spread["rows"]
    counts = sorted({len(row["values"]) for row in rows})
    listed = ", ".join(f"{row['method']} {numbers.percent(row['mean'])}" for row in rows)
    said = [f"Means over {' or '.join(map(str, counts))} seeds, best first: {listed}."]
    if spread["start"] is None:
        return said
    sure = [row["method"] for row in rows if row["low"] is not None and row["low"] > 0]
    start = f"The start, {spread['start']}, has {numbers.percent(spread['value'])}"
    gained = f"the gain is beyond the spread of seeds for {', '.join(sure) or 'none of them'}"
    return [*said, f"{start}; {gained}."]


def order(stages: Sequence[Stage]) -> list[str]:
    """Ways that were tried beside each other, the best first, by each result that all have."""
    said = []
    for name in dict.fromkeys(n for s in stages for n in s.results):
        figures = {s.subject: s.results[name] for s in stages if name in s.results}
        if len(figures) < len(stages) or len(figures) < 2:
            continue
        less = next(iter(figures.values()))["unit"] in LESS_IS_BETTER
        ranked = sorted(figures, key=lambda subject: figures[subject]["value"], reverse=not less)
        listed = ", ".join(f"{subject} {numbers.figure(figures[subject])}" for subject in ranked)
        best, second = (figures[subject] for subject in ranked[:2])
        clear = "" if _apart(best, second) else "; the first two may differ by chance"
        said.append(f"By {name}, best first: {listed}{clear}.")
    return said


def _apart(one: Figure, other: Figure) -> bool:
    ends = (one["low"], one["high"], other["low"], other["high"])
    if any(end is None for end in ends):
        return True
    return bool(one["low"] > other["high"] or other["low"] > one["high"])  # type: ignore[operator]


def _accuracy(path: Sequence[Stage], comparison: Comparison | None, who: str) -> list[str]:
    measured = [(s, h) for s in measured_of(path) if (h := headline(s)) is not None]
    if not measured:
        return []
    last, final = measured[-1]
    said = f"{who} ({last.subject}) answers {_share(final)} of {final['n']:,} held-out "
    said += "problems right"
    if len(measured) == 1:
        return [said + "."]
    first, base = measured[0]
    said += f"; before ({first.subject}) it was {_share(base)}."
    if problems_of(first) != problems_of(last):
        return [said, "The two were measured on different tasks and do not compare."]
    difference = _overlap(base, final) if comparison is None else _paired(comparison)
    return [said, difference, *_better(measured)]


def _ways(step: Mapping[str, Any]) -> list[str]:
    """Of each exam the way that was right most often, and the one that cost least."""
    said = []
    for exam in dict.fromkeys(row["exam"] for row in step["rows"]):
        rows = [row for row in step["rows"] if row["exam"] == exam]
        best = max(rows, key=lambda row: (row["accuracy"]["value"], -row["tokens"]))
        least = min(rows, key=lambda row: row["tokens"])
        text = f"In {step['step']}, {exam}: {_way(best)}"
        said.append(f"{text}." if best is least else f"{text}, {_way(least)}.")
    return said


def _way(row: Mapping[str, Any]) -> str:
    spent = f"{row['tokens']:,.0f} tokens a problem"
    return f"{row['strategy']} is right on {_share(row['accuracy'])} for {spent}"


def _better(measured: Sequence[tuple[Stage, Figure]]) -> list[str]:
    """The best stage, where the last one clearly fell behind it."""
    last, final = measured[-1]
    best, top = max(measured, key=lambda pair: pair[1]["value"])
    if top["low"] is None or final["high"] is None or top["low"] <= final["high"]:
        return []
    if problems_of(best) != problems_of(last):
        return []
    return [f"An earlier stage was better: {best.subject} with {_share(top)}."]


def _paired(c: Comparison) -> str:
    said = (
        f"On the same {c.n:,} problems, {c.wrong_right:,} turned from wrong to right and "
        f"{c.right_wrong:,} from right to wrong: {numbers.points(c.difference)} points "
        f"(95% interval {numbers.points(c.low)} to {numbers.points(c.high)})"
    )
    return said + (", which chance alone may explain." if c.low <= 0 <= c.high else ".")


def _overlap(base: Figure, final: Figure) -> str:
    if base["high"] is None or final["low"] is None or base["low"] is None or final["high"] is None:
        return "No intervals were computed, so chance may explain the difference."
    if base["high"] < final["low"]:
        return "The intervals do not overlap."
    if final["high"] < base["low"]:
        return "It became worse: the intervals do not overlap."
    return "The intervals overlap: chance alone may explain the difference."


def _text(stages: Sequence[Stage], unit: str, what: str) -> list[str]:
    """How well it predicts text, beside the stage it started from or a baseline."""
    said = []
    for name in dict.fromkeys(n for s in stages for n, f in s.results.items() if f["unit"] == unit):
        path = [s for s in path_of(stages) if name in s.results]
        others = [s for s in stages if s.baseline and name in s.results]
        if not path:
            continue
        value = numbers.figure(path[-1].results[name])
        compared = [f"{numbers.figure(s.results[name])} ({s.subject})" for s in others]
        if len(path) > 1:
            compared.append(f"{numbers.figure(path[0].results[name])} before")
        beside = f", against {' and '.join(compared)}" if compared else ""
        said.append(f"{what} of {name} is {value}{beside}.")
    return said


def _losses(training: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for part in training:
        for curve in part["curves"]:
            if curve["metric"] == "loss":
                ends = curve["smoothed"] or curve["values"]
                said.append(
                    f"In {part['step']} the loss went from {numbers.plain(ends[0])} to "
                    f"{numbers.plain(ends[-1])} in {curve['steps'][-1]:,} steps."
                )
    return said


def _cost(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    paid = [s for s in steps if s["seconds"] is not None]
    if not paid:
        return []
    seconds, joules = sum(s["seconds"] for s in paid), sum(s["joules"] for s in paid)
    how = " and ".join(dict.fromkeys(s["energy"] for s in paid))
    peak = max(s["peak_bytes"] for s in paid)
    so_far = "" if all(s["state"] == "done" for s in steps) else " so far"
    return [
        f"The run took {numbers.duration(seconds)}{so_far}, {numbers.energy(joules)} ({how}) and "
        f"at most {numbers.size(peak)} of memory."
    ]


def _missing(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    left = [f"{s['name']} {STATES[s['state']]}" for s in steps if s["state"] != "done"]
    return [f"The run is not finished: {'; '.join(left)}."] if left else []


def _share(measured: Figure) -> str:
    ends = numbers.interval(measured).replace("–", " to ")
    return numbers.figure(measured) + (f" (95% interval {ends})" if ends else "")
