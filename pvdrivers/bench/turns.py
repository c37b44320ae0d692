"""Sides that stand ready and are measured in turns; the fastest place of one that may run in several."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .blk_rows import Place

__all__ = ["Measure", "Run", "Side", "best", "in_turns"]

_LOOK_SECONDS, _LOOKS = 1.0, 3  # to find the best place

Run = dict[str, Any]
Measure = Callable[[float], Run]
Side = contextlib.AbstractContextManager[Measure]


def in_turns(measures: dict[str, Measure], pairs: int, seconds: float) -> dict[str, list[Run]]:
    """Each once in every round, the first of them (ours) first in one and last in the next.

    Who comes second finds a disk that is awake, or a neighbour who is: each comes second half of the time.
    """
    found: dict[str, list[Run]] = {name: [] for name in measures}
    for i in range(pairs):
        names = list(measures)
        for name in reversed(names) if i % 2 else names:
            found[name].append(measures[name](seconds))
    return found


def best(
    places: Sequence[Place], make: Callable[[Place], Side], stack: contextlib.ExitStack
) -> tuple[Measure, str]:
    """The side in its only place, or in the fastest of several by a few short looks; and the name of the place."""
    if len(places) == 1:
        return stack.enter_context(make(places[0])), places[0].name
    rates = {}
    for place in places:
        with make(place) as measure:
            rates[place] = statistics.median(measure(_LOOK_SECONDS)["rate"] for _ in range(_LOOKS))
    fastest = max(places, key=lambda place: rates[place])
    return stack.enter_context(make(fastest)), fastest.name
