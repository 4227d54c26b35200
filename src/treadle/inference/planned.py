"""What a scheduler planned, as the rows of one pass."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.inference.guesses import Path
from treadle.inference.runner import Batch
from treadle.inference.sequence import Active


@dataclass(frozen=True)
class _Row:
    sequence: Active
    tokens: list[int]
    table: list[int]
    wanted: int
    path: Path | None = None


def batch_of(plan: list[tuple[Active, int]], page: int) -> Batch:
    """The planned tokens, and behind them the paths that sequences guess besides their first.

    Logits only where a sequence's last known token is among them; each path is told where its
    own end.
    """
    rows = [_planned(sequence, count) for sequence, count in plan]
    rows += [_guessed(s, path, page) for s, _ in plan for path in s.guesses.paths[1:]]
    end = 0
    for row in rows:
        end += row.wanted
        if row.path is not None:
            row.path.end = end
    return Batch(
        tokens=[token for row in rows for token in row.tokens],
        counts=[len(row.tokens) for row in rows],
        starts=[row.sequence.computed for row in rows],
        tables=[row.table for row in rows],
        outputs=[row.wanted for row in rows],
        adapters=[row.sequence.request.adapter for row in rows],
        names=[row.sequence.name for row in rows],
    )


def _planned(sequence: Active, count: int) -> _Row:
    """Known tokens, and the first path behind the last of them."""
    known, trunk = sequence.slice(sequence.computed, sequence.computed + count), None
    wanted = count if sequence.reads else int(count >= sequence.pending)
    if sequence.guesses.paths:
        trunk = sequence.guesses.paths[0]
        known, wanted = [*known, *trunk.tokens], 1 + len(trunk.tokens)
    return _Row(sequence, known, sequence.table, wanted, trunk)


def _guessed(sequence: Active, path: Path, page: int) -> _Row:
    """The last known token and another path; logits where it leaves those before it."""
    at = sequence.computed
    tokens = [*sequence.slice(at, at + 1), *path.tokens]
    table = sequence.table[: at // page] + path.pages
    return _Row(sequence, tokens, table, len(path.tokens) - path.shared, path)
