"""Ours beside theirs: ratios of pairs that ran next to each other, and a table that says how sure they are.

On a shared machine speed changes from minute to minute, for both alike; so what counts is the ratio within a pair,
never one figure of today beside one of yesterday. The interval is that of the median by order statistics: it
supposes nothing about how the ratios are distributed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Comparison", "paired", "table"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The median of `n` ratios, and the interval [low, high] that holds the true one with 95 %."""

    median: float
    low: float
    high: float
    n: int

    def meets(self, target: float) -> bool:
        """A target is missed when the whole interval lies below it."""
        return self.high >= target

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare runs pair by pair; both in the same unit, where more is better.

    Below six pairs no interval reaches 95 %; then it is all of the range. Raises ValueError for sequences that are
    empty or of different lengths.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} runs of ours beside {len(theirs)}: not pairs")
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    cut = _rank(len(ratios))
    return Comparison(statistics.median(ratios), ratios[cut], ratios[-1 - cut], len(ratios))


def _rank(n: int) -> int:
    """How many of `n` sorted values may be left off at each end so that the median stays inside with 95 %."""
    cut, tail = 0, 0.0
    for c in range((n - 1) // 2 + 1):
        tail += math.comb(n, c) / 2**n  # that c values or fewer lie on one side of the median
        if 1 - 2 * tail < CONFIDENCE:
            break
        cut = c
    return cut


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """The rows as text, one line each, columns aligned. `columns` maps keys of a row to headings."""
    cells = [list(columns.values())]
    cells += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.2f}"
