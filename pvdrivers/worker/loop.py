"""The loop of a worker. It knows rings, completions and sleep, and no device class.

A pass visits only rings with something pending, gives each a budget so that no guest starves another, and makes at
most one system call besides those that a full chunk of I/O asks for:

    reap      completions: I/O is handed back to its ring, an event marks its ring ready
    finish    rings that are due: release, respond, notify               (class: RING.finish)
    serve     rings with something pending: take, plan, acquire, submit  (class: RING.step)
    rest      nothing left: arm the events, look once more, and wait once for everything; or nap, see `nap`

It leaves only when told to stop, or when io_uring itself fails.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, ECANCELED, EIO, ENOENT, ENOMEM
from typing import Any

import numpy as np

from pvdrivers.platform import SEAM
from pvdrivers.storage.uring import advance, cqe, queue_poll, queue_poll_remove, queue_poll_unread, reap, wait
from pvdrivers.storage.uring_device import queue_cancel, queue_read
from pvdrivers.storage.uring_layout import CQE, IORING_CQE_F_MORE
from pvdrivers.syscalls import EINTR, sched_yield
from rings.atomics import call, i64, load_acquire64, pause, records, store_release64
from rings.jit import inline, kernel
from rings.ring import available, final_check

from .alarm import until_alarm, wake_due
from .events import unmask, unmask_now
from .fair import look_around
from .marks import complete, mark_active, mark_ready, pop_ready, ring_address, ring_at, worker_at
from .nap import is_deep, nap_length, now_ns
from .records import (
    RING_ACTIVE,
    RING_ATTACHING,
    RING_DEAD,
    RING_DETACHED,
    RING_DETACHING,
    RING_FREE,
    TAG_DOORBELL,
    TAG_EVENT,
    TAG_MASK,
    TAG_REMOVED,
    TAG_UNMASK,
    TOP_RING_AT,
)
from .storm import count_event, let_in, longest

_I4 = np.dtype(np.int32)
INDEX_MASK = 0xFFFFFF
HOUSEKEEPING_NS = 10_000_000_000  # less than between two rings of the watchdog: what is done then is done at all
SHARED_EVENTS = INDEX_MASK  # the index that stands for the one event fd of all rings


@inline
def _seam(w: Any) -> Any:
    return records(w["seam"], 1, SEAM)[0]


@inline
def _store_state(ra: int, state: int) -> None:
    store_release64(ra, i64(state))  # RING.state is the first field; pairs with the control thread's load


@kernel
def _listen(wa: int) -> None:
    """Hear of the events of all rings, where they have one fd: have it read, or polled."""
    w = worker_at(wa)
    w["deaf"] = 0
    if w["event_fd"] < 0:
        return
    tag = TAG_EVENT | SHARED_EVENTS
    if w["event_in"] != 0:
        result = queue_read(w["uring"], w["event_fd"], w["event_in"], w["event_in_size"], tag)
    else:
        # Not by its edges: to /dev/xen/evtchn a port that comes while it is read is none.
        result = queue_poll_unread(w["uring"], w["event_fd"], tag)
    if result != 0:
        w["deaf"] = 1


@kernel
def _collect_events(wa: int, token: int, n: int) -> None:
    """An event fd became readable, or n bytes of it were read: every ring whose port is pending becomes ready."""
    w = worker_at(wa)
    seam = _seam(w)
    call(seam["event_deliver"], seam["event_ctx"], token, n, 0)
    ports = records(w["port_ring"], w["max_ports"], _I4)
    for _ in range(w["max_ports"]):
        port = call(seam["event_next"], seam["event_ctx"], 0, 0, 0)
        if port < 0:
            break
        w["events"] += 1
        index = i64(ports[port]) if port < w["max_ports"] else i64(-1)
        if index < 0:
            continue  # bound, and no ring yet, which lets it in when it comes: until then nobody may wake us by it
        ra = ring_address(w, index)
        ring = ring_at(ra)
        state = load_acquire64(ra)
        if state == RING_DETACHED or state == RING_FREE or state == RING_ATTACHING:
            continue  # its page may be gone by now, and its port goes with it; or it is to come, and lets it in then
        ring["masked"] = 1
        count_event(wa, ra)
        mark_ready(wa, ra)


@kernel
def _try_detach(wa: int, ra: int) -> None:
    """The control thread wants the ring back; it has it when nothing is in flight and its poll has ended."""
    ring = ring_at(ra)
    if ring["state"] != RING_DETACHING or ring["inflight"] != 0:
        return
    if ring["ready"] != 0 or ring["active"] != 0:
        worker_at(wa)["leaving"] = 1  # it is on a list: again when it has been taken off
        return
    if ring["event_fd"] >= 0 and ring["polled"] != 0:
        if ring["polled"] == 1:
            ring["polled"] = 2
            tag = TAG_EVENT | ring["index"]
            queue_poll_remove(worker_at(wa)["uring"], ring["event_fd"], tag, TAG_REMOVED | ring["index"])
        return
    _store_state(ra, RING_DETACHED)


@kernel
def _look_at_rings(wa: int) -> None:
    """The doorbell rang: rings come, go, or are to look at their device again."""
    w = worker_at(wa)
    for i in range(load_acquire64(wa + TOP_RING_AT)):
        ra = ring_address(w, i)
        # Acquire: who sees the state sees the record that the control thread has filled in.
        state = load_acquire64(ra)
        if state == RING_FREE or state == RING_DETACHED or state == RING_DEAD:
            continue
        ring = ring_at(ra)
        if state == RING_ATTACHING:
            if ring["event_fd"] >= 0:
                ring["polled"] = 1
                queue_poll(w["uring"], ring["event_fd"], TAG_EVENT | i)
            ring["masked"] = ring["port"] >= 0  # an event that came before its ring did is held back
            _store_state(ra, RING_ACTIVE)
            mark_ready(wa, ra)
        elif state == RING_ACTIVE:
            mark_ready(wa, ra)
        elif state == RING_DETACHING:
            if ring["waiting"] != 0 or ring["replay_head"] != 0:
                call(ring["step"], wa, ra, 0, 1)  # what waits for other rings, or has not begun, is given up
            _try_detach(wa, ra)


@inline
def _shared_events(wa: int, res: int, flags: int) -> None:
    """The read or the poll of the events of all rings has completed."""
    w = worker_at(wa)
    if w["event_in"] == 0:
        if flags & IORING_CQE_F_MORE == 0:
            _listen(wa)
        _collect_events(wa, w["event_token"], 0)
        return
    if res > 0:
        _collect_events(wa, w["event_token"], res)
    elif res == -ENOMEM:
        w["deaf"] = 1  # behind the next sleep, then, which housekeeping ends
        return
    elif res != -EAGAIN and res != -EINTR and res != -ECANCELED:
        w["error"] = res if res < 0 else -EIO  # nothing would be heard of any ring any more
    _listen(wa)  # not before: it is read to where the ports were


@inline
def _event_completion(wa: int, index: int, res: int, flags: int) -> None:
    """A poll fired. One that has ended is queued again, unless its ring is on the way out."""
    w = worker_at(wa)
    if index == SHARED_EVENTS:
        _shared_events(wa, res, flags)
        return
    ra = ring_address(w, index)
    ring = ring_at(ra)
    if flags & IORING_CQE_F_MORE == 0:
        if ring["state"] == RING_DETACHING or ring["state"] == RING_DEAD:
            ring["polled"] = 0
            _try_detach(wa, ra)
            return
        queue_poll(w["uring"], ring["event_fd"], TAG_EVENT | index)
    if ring["state"] != RING_ACTIVE:
        return
    if ring["port"] < 0:
        mark_ready(wa, ra)  # no event channel: a descriptor of its class's own
    else:
        _collect_events(wa, ring["event_token"], 0)


@inline
def _poll_removed(wa: int, index: int, res: int) -> None:
    """What came of taking a poll away. It may refuse: a guest that storms can keep it firing (-EALREADY)."""
    if index == SHARED_EVENTS:
        return
    ra = ring_address(worker_at(wa), index)
    ring = ring_at(ra)
    if ring["state"] != RING_DETACHING or ring["polled"] != 2 or res == 0:
        return  # its last completion has come, or will
    ring["polled"] = 0 if res == -ENOENT else 1
    _try_detach(wa, ra)


@kernel
def _handle_completions(wa: int, n: int) -> None:
    """Hand `n` completions to whom they belong."""
    w = worker_at(wa)
    u = w["uring"]
    for _ in range(n):
        c = records(cqe(u, 0), 1, CQE)[0]
        user_data, res, flags = i64(c["user_data"]), i64(c["res"]), i64(c["flags"])
        advance(u, 1)
        tag = user_data & TAG_MASK
        if tag == 0:
            w["inflight"] -= 1
            complete(user_data, res)
        elif tag == TAG_EVENT:
            _event_completion(wa, user_data & INDEX_MASK, res, flags)
        elif tag == TAG_REMOVED:
            _poll_removed(wa, user_data & INDEX_MASK, res)
        elif tag == TAG_DOORBELL:
            if flags & IORING_CQE_F_MORE == 0:
                queue_poll(u, w["doorbell_fd"], TAG_DOORBELL)
            _look_at_rings(wa)
        elif tag == TAG_UNMASK:
            w["error"] = res  # ports that stay masked for ever


@kernel
def _finish(wa: int) -> None:
    """Every ring that is due releases, responds and notifies."""
    w = worker_at(wa)
    while w["done_head"] != 0:
        ra = w["done_head"]
        ring = ring_at(ra)
        w["done_head"] = ring["next_done"]
        ring["next_done"] = 0
        ring["due"] = 0
        call(ring["finish"], wa, ra, 0, 0)
        if ring["state"] == RING_DETACHING:
            _try_detach(wa, ra)


@kernel
def _serve(wa: int) -> int:
    """Every ring that is ready now, once, with its budget. One that has more goes to the end of the line."""
    w = worker_at(wa)
    last = w["ready_tail"]
    served = 0
    while w["ready_head"] != 0:
        ra = pop_ready(wa)
        ring = ring_at(ra)
        if ring["state"] == RING_ACTIVE:
            served += 1
            mark_active(wa, ra)
            if call(ring["step"], wa, ra, w["budget"], 0) > 0:
                mark_ready(wa, ra)
        if ra == last:
            break
    return served


@kernel
def _poll_active(wa: int) -> int:
    """Look at rings whose events are not armed; how many have something for us."""
    ra = worker_at(wa)["active_head"]
    found = 0
    while ra != 0:
        ring = ring_at(ra)
        if ring["state"] == RING_ACTIVE and ring["blocked"] == 0 and available(ring["end"]) != 0:
            mark_ready(wa, ra)
            found += 1
        ra = ring["next_active"]
    return found


@kernel
def _arm(wa: int, napping: int) -> int:
    """Ask every active ring's peer to wake us by its next request; how many had one already. See final_check.

    Before a nap those stay as they are whose requests are to come together.

    Events are let in again here, and not before: a worker that goes round looks at its rings anyway, so that a storm
    costs its sender a visit each, not us a wake-up each.
    """
    w = worker_at(wa)
    found = 0
    unmasked = False
    keep = i64(0)
    while w["active_head"] != 0:
        ra = w["active_head"]
        ring = ring_at(ra)
        w["active_head"] = ring["next_active"]
        if napping != 0 and is_deep(ra):
            ring["next_active"] = keep
            keep = ra
            continue
        # A blocked ring has requests that it cannot take now; what unblocks it marks it ready.
        if ring["state"] == RING_ACTIVE and ring["blocked"] == 0 and final_check(ring["end"]) != 0:
            mark_ready(wa, ra)
            found += 1
            ring["next_active"] = keep
            keep = ra
        else:
            ring["active"] = 0
            if ring["masked"] != 0 and ring["storming"] == 0:
                unmasked = True
                unmask(wa, ra)
    w["active_head"] = keep
    if unmasked:
        unmask_now(wa)
    return found


@kernel
def _keep_house(wa: int) -> None:
    """Every ten seconds, however busy: idle rings let go of pages that they keep for nothing."""
    w = worker_at(wa)
    w["house_at"] = w["now"] + HOUSEKEEPING_NS
    _look_at_rings(wa)
    # evtchn may miss to wake, within a few instructions: whoever asks anew is told.
    if w["event_in"] != 0:
        tag = TAG_EVENT | SHARED_EVENTS
        queue_cancel(w["uring"], tag, TAG_REMOVED | SHARED_EVENTS)
    elif w["event_fd"] >= 0:
        _collect_events(wa, w["event_token"], 0)


@kernel
def run(wa: int) -> int:
    """The loop. 0 when told to stop, or -errno of io_uring."""
    w = worker_at(wa)
    u = w["uring"]
    queue_poll(u, w["doorbell_fd"], TAG_DOORBELL)
    _listen(wa)
    _look_at_rings(wa)
    busy_until = i64(0)
    while load_acquire64(wa) == 0 and w["error"] == 0:  # WORKER.stop is the first field
        w["passes"] += 1
        n = reap(u)
        w["now"] = now_ns(wa)
        look_around(wa)
        if n > 0:
            _handle_completions(wa, n)
        let_in(wa)
        wake_due(wa)
        if w["now"] >= w["house_at"]:
            _keep_house(wa)
        _finish(wa)
        _poll_active(wa)
        served = _serve(wa)
        _finish(wa)
        if w["leaving"] != 0:
            # Not only before a sleep: a busy worker may never come to one, and its lists never be empty.
            w["leaving"] = 0
            _arm(wa, 0)
            _look_at_rings(wa)
        if w["ready_head"] != 0 or w["done_head"] != 0:
            continue
        if w["spin_ns"] > 0:
            if n > 0 or served > 0:
                busy_until = w["now"] + w["spin_ns"]
            if w["now"] < busy_until:
                pause()
                continue
        nap = nap_length(wa) if n > 0 or served > 0 else i64(0)
        if _arm(wa, nap) > 0:
            continue
        if w["leaving"] != 0:
            continue
        if nap > 0:
            w["naps"] += 1
        else:
            w["sleeps"] += 1
        n = wait(u, until_alarm(wa, longest(wa, nap if nap > 0 else max(w["house_at"] - w["now"], i64(1)))))
        if n == -EAGAIN or n == -EBUSY:
            # Short of memory, or of room for completions: nothing is lost, it is all still queued.
            w["short"] += 1
            sched_yield()
        elif n < 0 and n != -EINTR:
            w["error"] = n
        if w["deaf"] != 0:
            _listen(wa)
    return w["error"]
