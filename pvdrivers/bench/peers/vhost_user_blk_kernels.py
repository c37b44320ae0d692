"""A virtio-blk driver's loop on a split virtqueue: our load generator (frontends/load_kernels.py) on their ring.

Message for message the same work: random blocks from the same generator with nothing else in flight on them, a stamp
for each request and one clock read a pass, every status looked at, notifications held off by event index.
Structures: Virtual I/O Device (VIRTIO) 1.1, 2.6 "Split Virtqueues" and 5.2 "Block Device".
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import POLLFD, clock_monotonic, eventfd_add, eventfd_take, poll
from pvdrivers.worker.histogram import bucket_of
from rings.atomics import (
    full_barrier,
    load8,
    load32,
    load64,
    load_acquire16,
    load_acquire64,
    load_once16,
    pause,
    records,
    store8,
    store16,
    store32,
    store64,
    store_once16,
    store_release16,
)
from rings.jit import inline, kernel

CLIENT = np.dtype(
    [
        ("drain", "i8"),  # shared with Python: issue no more, end when nothing is in flight
        ("desc", "i8"),
        ("avail", "i8"),
        ("used", "i8"),
        ("headers", "i8"),  # HEADER_SIZE for each slot: what goes out, and the status that comes back
        ("size", "i8"),  # descriptors in the queue, a power of two
        ("depth", "i8"),
        ("block_sectors", "i8"),
        ("blocks", "i8"),
        ("random", "i8"),
        ("spin", "i8"),  # looks at the ring before sleeping
        ("kick_fd", "i8"),
        ("call_fd", "i8"),
        ("avail_idx", "i8"),
        ("used_idx", "i8"),
        ("free", "i8"),  # i4 stack of free slots
        ("free_n", "i8"),
        ("slots", "i8"),  # SLOT[depth]
        ("busy", "i8"),  # u1[blocks]
        ("hist", "i8"),  # latencies, a bucket each
        ("pollfd", "i8"),  # scratch
        ("random_state", "i8"),
        ("next_block", "i8"),
        ("completed", "i8"),
        ("kicks", "i8"),
        ("sleeps", "i8"),
        ("stalls", "i8"),  # sleeps that nobody ended
    ],
    align=True,
)

SLOT = np.dtype([("block", "i8"), ("started", "i8")], align=True)

HEADER_SIZE = 64
STATUS_AT = 32  # in it
DESC_SIZE = 16
PER_REQUEST = 4  # descriptors a slot owns; three are used
DESC_F_NEXT, DESC_F_WRITE = 1, 2
BLK_T_IN, BLK_T_OUT = 0, 1

FINISHED, SLICE, FAILED, VIOLATED, STALLED = 0, 1, -1, -2, -3

_SLOT_SIZE = SLOT.itemsize
_POLLIN = 1
_TICK_NS = 100_000_000
_MOST_STALLS = 50


@kernel
def fill(ca: int, data: int, block_size: int, op: int) -> None:
    """Write the descriptors that never change: header, data, status of each slot. `data`: where the pages are.

    Addresses are those of our own mapping, which SET_MEM_TABLE has named as both ours and the guest's.
    """
    c = records(ca, 1, CLIENT)[0]
    for t in range(c["depth"]):
        header = c["headers"] + t * HEADER_SIZE
        d = c["desc"] + PER_REQUEST * t * DESC_SIZE
        first = PER_REQUEST * t
        store32(header, np.uint32(op))
        store32(header + 4, np.uint32(0))
        _descriptor(d, header, 16, DESC_F_NEXT, first + 1)
        write = DESC_F_WRITE if op == BLK_T_IN else 0
        _descriptor(d + DESC_SIZE, data + t * block_size, block_size, DESC_F_NEXT | write, first + 2)
        _descriptor(d + 2 * DESC_SIZE, header + STATUS_AT, 1, DESC_F_WRITE, 0)


@inline
def _descriptor(d: int, address: int, length: int, flags: int, following: int) -> None:
    store64(d, address)
    store32(d + 8, np.uint32(length))
    store16(d + 12, np.uint16(flags))
    store16(d + 14, np.uint16(following))


@inline
def _draw(ca: int) -> int:
    """31 random bits: the generator of load_kernels.py."""
    c = records(ca, 1, CLIENT)[0]
    c["random_state"] = (c["random_state"] * 25214903917 + 11) & 0xFFFFFFFFFFFF
    return int(c["random_state"] >> 17)


@kernel
def _issue(ca: int, now: int) -> int:
    """Make available what there is a free slot for, and kick if the device asked for it; how many."""
    c = records(ca, 1, CLIENT)[0]
    mask = c["size"] - 1
    issued = 0
    while c["free_n"] > 0:
        if c["random"] != 0:
            block = _draw(ca) % c["blocks"]
            while load8(c["busy"] + block) != 0:
                block = _draw(ca) % c["blocks"]
        else:
            block = c["next_block"]
            if load8(c["busy"] + block) != 0:
                break
            c["next_block"] = block + 1 if block + 1 < c["blocks"] else 0
        c["free_n"] -= 1
        t = int(load32(c["free"] + c["free_n"] * 4))
        store8(c["busy"] + block, np.uint8(1))
        slot = records(c["slots"] + t * _SLOT_SIZE, 1, SLOT)[0]
        slot["block"] = block
        slot["started"] = now
        header = c["headers"] + t * HEADER_SIZE
        store64(header + 8, block * c["block_sectors"])
        store8(header + STATUS_AT, np.uint8(0xFF))  # so that a status nobody wrote is seen
        store16(c["avail"] + 4 + 2 * ((c["avail_idx"] + issued) & mask), np.uint16(PER_REQUEST * t))
        issued += 1
    if issued > 0:
        old = c["avail_idx"]
        c["avail_idx"] = old + issued
        # Release: descriptors and ring before the index. Full barrier: the index before the device's wish is read.
        store_release16(c["avail"] + 2, np.uint16(c["avail_idx"]))
        full_barrier()
        event = int(load_once16(c["used"] + 4 + 8 * c["size"]))  # avail_event
        if (c["avail_idx"] - event - 1) & 0xFFFF < issued:
            c["kicks"] += 1
            eventfd_add(c["kick_fd"], 1)
    return issued


@kernel
def _reap(ca: int, now: int) -> int:
    """Take what the device has used: how many, FAILED for a status, VIOLATED for an id that is none."""
    c = records(ca, 1, CLIENT)[0]
    mask = c["size"] - 1
    # Acquire: what the index tells of is read after it.
    n = (int(load_acquire16(c["used"] + 2)) - c["used_idx"]) & 0xFFFF
    for k in range(n):
        id = int(load32(c["used"] + 4 + 8 * ((c["used_idx"] + k) & mask)))
        t = id // PER_REQUEST
        if t >= c["depth"] or id % PER_REQUEST != 0:
            return VIOLATED
        if load8(c["headers"] + t * HEADER_SIZE + STATUS_AT) != 0:
            return FAILED
        slot = records(c["slots"] + t * _SLOT_SIZE, 1, SLOT)[0]
        store8(c["busy"] + slot["block"], np.uint8(0))
        at = c["hist"] + bucket_of(now - slot["started"]) * 8
        store64(at, load64(at) + 1)
        store32(c["free"] + c["free_n"] * 4, np.uint32(t))
        c["free_n"] += 1
    c["used_idx"] += n
    c["completed"] += n
    return int(n)


@inline
def _waiting(ca: int) -> bool:
    c = records(ca, 1, CLIENT)[0]
    return (int(load_once16(c["used"] + 2)) - c["used_idx"]) & 0xFFFF != 0


@kernel
def _sleep(ca: int) -> int:
    """Ask for a call, look once more, and wait for it; < 0 if the device seems to be gone."""
    c = records(ca, 1, CLIENT)[0]
    store_once16(c["avail"] + 4 + 2 * c["size"], np.uint16(c["used_idx"] & 0xFFFF))  # used_event
    full_barrier()
    if _waiting(ca):
        return 0
    c["sleeps"] += 1
    p = records(c["pollfd"], 1, POLLFD)[0]
    p["fd"] = c["call_fd"]
    p["events"] = _POLLIN
    p["revents"] = 0
    # The device makes the eventfd that it was given non-blocking, for both of us: read only what is there.
    n = poll(c["pollfd"], 1, _TICK_NS)
    if n > 0:
        eventfd_take(c["call_fd"])
        c["stalls"] = 0
    elif n == 0:
        c["stalls"] += 1
        if c["stalls"] > _MOST_STALLS:
            return STALLED
    return 0


@kernel
def drive(ca: int, until: int) -> int:
    """Work until CLOCK_MONOTONIC is `until` ns, or drained: SLICE, FINISHED, or what went wrong."""
    c = records(ca, 1, CLIENT)[0]
    while True:
        now = clock_monotonic()
        draining = load_acquire64(ca) != 0  # CLIENT.drain, the first field
        if not draining:
            _issue(ca, now)
        n = _reap(ca, now)
        if n < 0:
            return n
        if n == 0:
            if draining and c["free_n"] == c["depth"]:
                return FINISHED
            for _ in range(c["spin"]):
                if _waiting(ca):
                    break
                pause()
            else:
                if _sleep(ca) < 0:
                    return STALLED
        if now >= until:
            return SLICE
