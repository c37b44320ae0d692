"""Event channel calls of the loop, with an end.

In the embedded Xen a notification is a write to an eventfd that the other end holds as well; a hostile end can make it
block. So the worker says since when it is in such a call, and a watchdog of the control side interrupts it when that
takes long: the call comes back with -EINTR, and its ring is dead. A call that does not block is never interrupted.
"""

from __future__ import annotations

from errno import EINTR, ENOMEM
from typing import Any

from pvdrivers.platform import SEAM
from rings.atomics import call, i64, records, store_release64
from rings.jit import inline, kernel

from .marks import mark_dead, ring_at, worker_at
from .records import CALLING_AT, V_EVENTS


@inline
def _seam(wa: int) -> Any:
    return records(worker_at(wa)["seam"], 1, SEAM)[0]


@kernel
def notify(wa: int, ra: int) -> None:
    """Wake the guest behind a ring."""
    seam = _seam(wa)
    store_release64(wa + CALLING_AT, worker_at(wa)["now"])
    result = call(seam["event_notify"], seam["event_ctx"], ring_at(ra)["port"], 0, 0)
    store_release64(wa + CALLING_AT, i64(0))
    if result == -EINTR:
        mark_dead(ra, V_EVENTS)


@kernel
def unmask(wa: int, ra: int) -> None:
    """Let the ring's port be delivered again, at the latest with the next unmask_now()."""
    seam = _seam(wa)
    ring_at(ra)["masked"] = 0
    store_release64(wa + CALLING_AT, worker_at(wa)["now"])
    result = call(seam["event_unmask"], seam["event_ctx"], ring_at(ra)["port"], 1, 0)
    store_release64(wa + CALLING_AT, i64(0))
    if result == -EINTR:
        mark_dead(ra, V_EVENTS)
    elif result == -ENOMEM:
        worker_at(wa)["error"] = result  # ports that stay masked for ever: the next process lets them in


@inline
def unmask_now(wa: int) -> None:
    """What was unmasked takes effect as the worker goes to sleep at the latest: by the very call that it sleeps in, or
    else by one for all."""
    w = worker_at(wa)
    seam = _seam(wa)
    if call(seam["event_unmask"], seam["event_ctx"], 0, 0, w["uring"] if w["event_in"] != 0 else 0) == -ENOMEM:
        w["error"] = -ENOMEM
