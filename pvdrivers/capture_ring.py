"""Packets on their way to a capture file: a ring of bytes in memory that a worker writes and another process reads.

One reader, and it takes no lock; who finds no room loses the packet, and counts it. The writers are the workers of a
vif's queues, which have a record of their own (CAPTURE), and take nothing from the shared memory but how far the reader
has got, which they check. They write one at a time: from take_room() to put_record() a writer holds the ring, for a
copy of one packet; who finds it held tries a bounded number of times, and then loses the packet as if there were no
room. The counters of a queue are its worker's alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import compare_exchange64, copy_bytes, i64, load_acquire64, pause, records, store_release64
from rings.jit import inline, kernel

MOST_QUEUES = 16
DATA_AT = 4096
"""Bytes of SHARED in the file; the ring follows."""

SHARED = np.dtype(
    [
        ("written", "i8"),  # bytes since the beginning; the writer's
        ("read", "i8"),  # ... and the reader's
        ("taken", "i8", (MOST_QUEUES,)),  # packets, by queue
        ("lost", "i8", (MOST_QUEUES,)),  # those for which there was no room
    ],
    align=True,
)
CAPTURE = np.dtype(
    [
        ("shared", "i8"),  # address of SHARED, DATA_AT bytes before the ring
        ("size", "i8"),  # bytes of the ring, a power of two
        ("snap", "i8"),  # most bytes of a packet
        ("written", "i8"),
        ("held", "i8"),  # a writer is at it
    ],
    align=True,
)
"""The writers' own."""
RECORD = np.dtype(
    [
        ("length", "i4"),  # bytes that follow, to the next multiple of 8; SKIP: the ring's end, and it begins anew
        ("size", "u4"),  # ... of what the packet had
        ("time", "i8"),  # ns, CLOCK_MONOTONIC
        ("queue", "u2"),
        ("outbound", "u2"),  # 1: from the guest; 0: to it
        ("csum", "u2"),  # rings.vnet: CSUM_*
        ("gso_type", "u2"),  # rings.netif: GSO_*, if
        ("gso_size", "u4"),  # ... this is not 0
        ("pad", "u4"),
    ],
    align=True,
)
RECORD_SIZE = RECORD.itemsize
SKIP = -1
_TRIES = 4096
"""Longer than it takes to copy the largest packet; a writer that lost its processor meanwhile is not waited for."""
_HELD_AT: int = CAPTURE.fields["held"][1]  # type: ignore[index]
_READ_AT: int = SHARED.fields["read"][1]  # type: ignore[index]


@inline
def capture_at(ca: int) -> Any:
    """The CAPTURE at an address."""
    return records(ca, 1, CAPTURE)[0]


@kernel
def _hold(ca: int) -> bool:
    for _ in range(_TRIES):
        if compare_exchange64(ca + _HELD_AT, 0, 1) == 0:
            return True
        pause()
    return False


@inline
def _let_go(ca: int) -> None:
    # Pairs with the exchange: who holds it next sees how far it is written.
    store_release64(ca + _HELD_AT, i64(0))


@kernel
def take_room(ca: int, queue: int, length: int) -> int:
    """The address for a RECORD and `length` bytes behind it, which put_record() makes seen; 0 if there is no room, and
    that is counted."""
    c = capture_at(ca)
    shared = records(c["shared"], 1, SHARED)[0]
    if not _hold(ca):
        shared["lost"][queue] += 1
        return i64(0)
    need = RECORD_SIZE + (length + 7 & ~7)
    at = c["written"] & (c["size"] - 1)
    left = c["size"] - at
    more = need if need <= left else left + need
    # Acquire: the reader has read what it gives back.
    used = c["written"] - load_acquire64(c["shared"] + _READ_AT)
    if used < 0 or used + more > c["size"]:
        shared["lost"][queue] += 1
        _let_go(ca)
        return i64(0)
    data = c["shared"] + DATA_AT
    if need > left:
        records(data + at, 1, RECORD)[0]["length"] = SKIP
        c["written"] += left
        at = i64(0)
    c["written"] += need
    shared["taken"][queue] += 1
    return data + at


@kernel
def put_record(ca: int, at: int, data: int, length: int) -> None:
    """The bytes behind a RECORD that is filled in but for its length; the reader sees it from now on."""
    c = capture_at(ca)
    records(at, 1, RECORD)[0]["length"] = length
    copy_bytes(at + RECORD_SIZE, data, length)
    store_release64(c["shared"], c["written"])  # SHARED.written is the first field
    _let_go(ca)


assert RECORD_SIZE % 8 == 0
assert SHARED.itemsize <= DATA_AT
