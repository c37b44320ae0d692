"""A guest that sends events with nothing behind them is let in ten times a second, until it has been quiet for a while.

An event costs its sender as much as us, but it wakes us, and the other guests of the worker want that time. An honest
guest sends one a request at the most; so more than that, and MOST a second besides, is a storm.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.syscalls import eventfd_add
from rings.atomics import i64, records
from rings.jit import inline, kernel
from rings.ring import RING_END, available

from .events import unmask, unmask_now
from .marks import mark_ready, ring_address, ring_at, stats_at, worker_at
from .records import RING_ACTIVE

WINDOW_NS = 1_000_000_000
MOST = 1000
"""Events in a window that have nothing behind them."""
HOLD_NS = 100_000_000
QUIET = 20
"""How often a port is found still, HOLD_NS apart, before its storm is over."""


@inline
def _say(wa: int, ra: int, storming: int) -> None:
    ring = ring_at(ra)
    ring["storming"], ring["quiet"] = storming, 0
    eventfd_add(worker_at(wa)["alert_fd"], 1)


@kernel
def count_event(wa: int, ra: int) -> None:
    """An event of this ring's guest has come, and nothing has been looked at yet."""
    w = worker_at(wa)
    ring = ring_at(ra)
    stats = stats_at(ring["stats"])
    stats["events"] += 1
    if ring["offered"] == 0 and available(ring["end"]) != 0:
        return
    stats["idle_events"] += 1
    e: Any = records(ring["end"], 1, RING_END)[0]
    if w["now"] - ring["storm_at"] >= WINDOW_NS:
        ring["storm_at"], ring["storm_cons"], ring["storm_events"] = w["now"], i64(e["cons"]), 0
    ring["storm_events"] += 1
    taken = (i64(e["cons"]) - ring["storm_cons"]) & 0xFFFFFFFF
    if ring["storming"] == 0 and ring["storm_events"] > MOST + taken:
        _say(wa, ra, i64(1))
        if w["let_in_at"] == 0:
            w["let_in_at"] = w["now"] + HOLD_NS


@kernel
def _let_in(wa: int) -> None:
    w = worker_at(wa)
    storms = i64(0)
    for i in range(w["top_ring"]):
        ra = ring_address(w, i)
        ring = ring_at(ra)
        if ring["state"] != RING_ACTIVE or ring["storming"] == 0:
            continue
        if ring["masked"] != 0:
            ring["quiet"] = 0
            mark_ready(wa, ra)
            unmask(wa, ra)
        else:
            ring["quiet"] += 1
            if ring["quiet"] >= QUIET:
                _say(wa, ra, i64(0))
                continue
        storms += 1
    unmask_now(wa)
    w["let_in_at"] = w["now"] + HOLD_NS if storms > 0 else i64(0)


@inline
def let_in(wa: int) -> None:
    """Once a pass: if it is time, ports whose guests storm are let in again, and their rings looked at."""
    w = worker_at(wa)
    if w["let_in_at"] != 0 and w["now"] >= w["let_in_at"]:
        _let_in(wa)


@inline
def longest(wa: int, ns: int) -> int:
    """How long may be waited for instead of so long."""
    w = worker_at(wa)
    return ns if w["let_in_at"] == 0 else min(ns, max(w["let_in_at"] - w["now"], i64(1)))
