"""`treadle trial`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.command import Command

if TYPE_CHECKING:
    from treadle.serving.verdict import Record


def trial(
    log: Annotated[Path, typer.Argument(help="What `treadle serve --trial-log` wrote.")],
    alpha: Annotated[
        float, typer.Option(min=1e-9, max=0.5, help="Chance of seeing what is not there.")
    ] = 0.05,
) -> None:
    """Say what an A/B or shadow test has found so far; it may be asked at any time."""
    from treadle.serving.verdict import read_events

    for name, record in sorted(read_events(log).items()):
        for line in lines(name, record, alpha):
            typer.echo(line)


def lines(name: str, record: Record, alpha: float) -> list[str]:
    """The report on one trial."""
    from treadle.serving.verdict import judge

    said = [f"{name}"]
    for side, arm in record.arms.items():
        if arm.answers:
            said.append(
                f"  {side} {record.models[side]}: {arm.answers} answers, {arm.tokens} tokens, "
                f"{arm.cancelled} cancelled, first token {_median(arm.first_tokens)}, "
                f"whole {_median(arm.seconds)}"
            )
    if record.shadows:
        said.append(f"  shadow: {record.same} of {record.shadows} answers have the same text")
    if not record.votes:
        return [*said, "  no votes yet"]
    found = judge(record.votes)
    for side, good, votes in zip("ab", found.good, found.votes, strict=True):
        said.append(f"  {side}: {good} of {votes} votes good")
    if not all(found.votes):
        return [*said, "  no verdict: one of them has no votes"]
    low, high = found.interval
    said.append(f"  b - a: {found.difference:+.3f} (95%: {low:+.3f} to {high:+.3f})")
    said.append(f"  p {found.p:.2g}, if this number of votes was settled before looking")
    said.append(f"  evidence {found.evidence:.3g} of {1 / alpha:.3g} needed, whenever one looks")
    if not found.decided(alpha):
        return [*said, "  verdict: none yet"]
    better = "b" if found.difference > 0 else "a"
    return [*said, f"  verdict: {better} ({record.models[better]}) is better"]


def _median(seconds: list[float]) -> str:
    from statistics import median

    return f"{median(seconds):.2f} s" if seconds else "-"


COMMAND = Command(
    name="trial",
    run=trial,
    examples=("treadle trial votes.jsonl", "treadle trial votes.jsonl --alpha 0.01"),
)
