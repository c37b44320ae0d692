"""What an operator hears of rings that go on all the same: once when it begins, and once when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import storm

LIMIT = (
    "Xen has no room for more mapped grants (maptrack, GNTST {status}); its requests are copied, which is tried again"
    " after a minute, and then ever more rarely; raise gnttab_max_maptrack_frames on Xen's command line (for a driver"
    " domain max_maptrack_frames in its xl configuration), or vm.max_map_count if that is what is short, or use"
    " policy=copy"
)

STORM = (
    "its guest sends events with nothing behind them,"
    f" more than {storm.MOST} a second; it is let in {10**9 // storm.HOLD_NS} times a second"
)


class Notices:
    """Remembers what was told of which device."""

    def __init__(self) -> None:
        self._told: list[tuple[Any, str]] = []

    def look(self, rings: Sequence[tuple[Any, np.void]]) -> Iterator[tuple[Any, str, str]]:
        """Of all rings, with the device of each: (device, kind of trouble, text) for what is new, and an empty text for
        what is over. A device that has no ring any more is forgotten."""
        now = list(_troubles(rings))
        for device, kind, text in now:
            if not any(d is device and k == kind for d, k in self._told):
                yield device, kind, text
        for device, kind in self._told:
            still = any(d is device and k == kind for d, k, _ in now)
            if not still and any(d is device for d, _ in rings):
                yield device, kind, ""
        self._told = [(device, kind) for device, kind, _ in now]


def _troubles(rings: Sequence[tuple[Any, np.void]]) -> Iterator[tuple[Any, str, str]]:
    """Each kind once a device, whatever the number of its rings."""
    seen: list[tuple[Any, str]] = []
    for device, ring in rings:
        for kind, text in _of(ring):
            if not any(d is device and k == kind for d, k in seen):
                seen.append((device, kind))
                yield device, kind, text


def _of(ring: np.void) -> Iterator[tuple[str, str]]:
    if ring["limit"]:
        yield "grants", LIMIT.format(status=int(ring["limit"]))
    if ring["storming"]:
        yield "events", STORM
