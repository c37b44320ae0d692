"""A ring that is to be looked at again at some time, whatever happens until then: time-outs and limits of classes."""

from __future__ import annotations

from rings.atomics import i64
from rings.jit import inline, kernel

from .marks import mark_ready, ring_address, ring_at, worker_at


@kernel
def wake_at(wa: int, ra: int, when: int) -> None:
    """Have a ring served no later than at `when`, ns as WORKER.now; once. It may be served before, and then has to ask
    again."""
    w = worker_at(wa)
    ring = ring_at(ra)
    if ring["wake_at"] == 0 or when < ring["wake_at"]:
        ring["wake_at"] = when
    if w["wake_at"] == 0 or when < w["wake_at"]:
        w["wake_at"] = when


@kernel
def _wake(wa: int) -> None:
    w = worker_at(wa)
    first = i64(0)
    for i in range(w["top_ring"]):
        ra = ring_address(w, i)
        when = ring_at(ra)["wake_at"]
        if when == 0:
            continue
        if when <= w["now"]:
            ring_at(ra)["wake_at"] = 0
            mark_ready(wa, ra)
        elif first == 0 or when < first:
            first = when
    w["wake_at"] = first


@inline
def wake_due(wa: int) -> None:
    """Once a pass: rings whose time has come are ready."""
    w = worker_at(wa)
    if w["wake_at"] != 0 and w["now"] >= w["wake_at"]:
        _wake(wa)


@inline
def until_alarm(wa: int, ns: int) -> int:
    """How long may be waited for instead of so long."""
    w = worker_at(wa)
    return ns if w["wake_at"] == 0 else min(ns, max(w["wake_at"] - w["now"], i64(1)))
