"""What an operator hears of rings that go on all the same: once when it begins, and once when it is over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

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

STALLED = "its guest has had too few buffers for a packet for too long; what is sent to it is dropped until it has"


FAILED = "{count} of its requests failed; the latest of {nbytes} bytes at byte {at}: {why}"


class Attached(Protocol):
    """A ring that a worker has: its device, and its RING."""

    @property
    def device(self) -> Any: ...

    @property
    def record(self) -> np.void: ...


class Notices:
    """Remembers what was told of which device, for as long as it has the ring that was the reason."""

    def __init__(self) -> None:
        self._told: list[tuple[Attached, str, str, int]] = []

    def look(self, rings: Sequence[Attached]) -> Iterator[tuple[Any, str, str, int]]:
        """Of all rings: (device, kind of trouble, text, how often it has come up on them) for what is new, and an empty
        text for what is over. What was told of rings that are gone is forgotten: of a device that has others by now it
        is told afresh."""
        now = list(_troubles(rings))
        told = [one for one in self._told if any(one[0] is ring for ring in rings)]
        for ring, kind, text, times in now:
            if not any(t.device is ring.device and k == kind and said == text for t, k, said, _ in told):
                yield ring.device, kind, text, times
        for ring, kind, _, _ in told:
            if not any(r.device is ring.device and k == kind for r, k, _, _ in now):
                yield ring.device, kind, "", 0
        self._told = now


def _troubles(rings: Sequence[Attached]) -> Iterator[tuple[Attached, str, str, int]]:
    """Each kind once a device, whatever the number of its rings."""
    seen: list[tuple[Any, str]] = []
    for ring in rings:
        for kind, text, times in _of(ring.device, ring.record):
            if not any(d is ring.device and k == kind for d, k in seen):
                seen.append((ring.device, kind))
                yield ring, kind, text, times


def _of(device: Any, ring: np.void) -> Iterator[tuple[str, str, int]]:
    if ring["limit"]:
        yield "grants", LIMIT.format(status=int(ring["limit"])), 1
    if ring["failures"]:
        count, gntst = int(ring["failures"]), int(ring["failed_gntst"])
        why = f"a page of its guest (GNTST {gntst})" if gntst else f"its store: {os.strerror(-int(ring['failed_res']))}"
        rounded = 1 << count.bit_length() - 1
        text = FAILED.format(count=rounded, nbytes=ring["failed_bytes"], at=ring["failed_at"], why=why)
        yield "io", text, rounded
    if ring["storming"]:
        yield "events", STORM, 1
    if ring["lost"]:
        yield "port", device.port_lost(-int(ring["lost"])), 1
    if ring["stalled"]:
        yield "stalled", STALLED, 1
