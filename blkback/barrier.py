"""What spans the queues of a device: a barrier is for the whole disk, not for the ring that it came by.

The ring with the barrier *holds* the device: it sets DISK.hold_by, and every other ring stops taking requests and,
once nothing of its own is in flight, acknowledges the hold's epoch. Rings of the same worker are simply looked at;
rings of another worker are told by its doorbell and tell by ours. Without a barrier all this costs one load a visit.
"""

from __future__ import annotations

from errno import EIO

from pvdrivers.syscalls import eventfd_add
from pvdrivers.worker.grants import release
from pvdrivers.worker.marks import complete, mark_ready, req_at, ring_at, worker_at
from pvdrivers.worker.records import HOLD_ACK_AT, RING_ACTIVE
from rings.atomics import compare_exchange64, i64, load_acquire64, store_release64
from rings.jit import inline, kernel

from .disk import start
from .records import HOLD_BY_AT, HOLD_EPOCH_AT, disk_at


@inline
def held_by(da: int) -> int:
    """The ring that holds the device, or 0. Pairs with the compare-exchange that takes the hold."""
    return load_acquire64(da + HOLD_BY_AT)


@inline
def _wake_ring(ra: int, other: int) -> None:
    """Have `other` served: directly if it is of our own worker, else by its worker's doorbell."""
    ring = ring_at(other)
    if ring["worker"] == ring_at(ra)["worker"]:
        mark_ready(ring["worker"], other)
    else:
        eventfd_add(worker_at(ring["worker"])["doorbell_fd"], 1)


@kernel
def _wake_others(ra: int, da: int) -> None:
    disk = disk_at(da)
    for i in range(disk["n_rings"]):
        if disk["rings"][i] != ra:
            _wake_ring(ra, disk["rings"][i])


@inline
def _resting(ra: int) -> bool:
    """Nothing in flight, but for a barrier of its own that has not begun."""
    ring = ring_at(ra)
    return ring["inflight"] == (1 if ring["waiting"] != 0 else 0)


@kernel
def tell_holder(ra: int, da: int) -> None:
    """A ring whose device another ring holds: once it is at rest it says so, and has the holder look again."""
    holder = held_by(da)
    if holder == 0 or holder == ra or not _resting(ra):
        return
    # Release: who sees the acknowledgement sees that nothing is in flight.
    store_release64(ra + HOLD_ACK_AT, load_acquire64(da + HOLD_EPOCH_AT))
    _wake_ring(ra, holder)


@inline
def _at_rest(ra: int, other: int, epoch: int) -> bool:
    """Whether `other` has come to rest for this hold. A ring that is not served takes nothing."""
    if ring_at(other)["worker"] == ring_at(ra)["worker"]:
        return _resting(other)
    if load_acquire64(other) != RING_ACTIVE:
        return ring_at(other)["inflight"] == 0
    return load_acquire64(other + HOLD_ACK_AT) == epoch


@kernel
def drive(wa: int, ra: int, da: int) -> None:
    """The barrier that waits in RING.waiting: begin it once the hold is ours and the whole device is at rest."""
    ring = ring_at(ra)
    disk = disk_at(da)
    ring["blocked"] = 1
    holder = held_by(da)
    if holder == 0:
        if compare_exchange64(da + HOLD_BY_AT, 0, ra) != 0:
            return  # another queue's barrier came first; its release wakes us
        store_release64(da + HOLD_EPOCH_AT, disk["hold_epoch"] + 1)
        _wake_others(ra, da)
    elif holder != ra:
        tell_holder(ra, da)
        return
    if ring["inflight"] != 1:  # earlier requests of our own; `finish` wakes us
        return
    epoch = disk["hold_epoch"]
    for i in range(disk["n_rings"]):
        other = disk["rings"][i]
        if other != ra and not _at_rest(ra, other, epoch):
            return
    qa = ring["waiting"]
    ring["waiting"] = 0
    ring["barrier"] = qa
    start(wa, qa, da)


@kernel
def release_hold(ra: int, da: int) -> None:
    """The barrier is done: all queues go on."""
    ring = ring_at(ra)
    ring["barrier"] = 0
    if held_by(da) == ra:
        store_release64(da + HOLD_BY_AT, i64(0))
    mark_ready(ring["worker"], ra)
    _wake_others(ra, da)


@kernel
def abandon(wa: int, ra: int, da: int) -> None:
    """The ring goes. What it has not begun is given up: what a dead predecessor had taken, a barrier that waits.

    At the end of the process both stay in the journal, and the next one does them; no queue takes anything until then,
    so nothing overtakes. At the end of the connection the barrier fails.
    """
    ring = ring_at(ra)
    while ring["replay_head"] != 0:
        ring["replay_head"] = req_at(ring["replay_head"])["next"]
        ring["inflight"] -= 1
    qa = ring["waiting"]
    if qa != 0:
        ring["waiting"] = 0
        if disk_at(da)["handed_over"] != 0:
            req_at(qa)["next"] = 0  # release goes by a list
            release(wa, qa)
            ring["inflight"] -= 1
            release_hold(ra, da)
        else:
            ring["barrier"] = qa
            complete(qa, -EIO)
    tell_holder(ra, da)
