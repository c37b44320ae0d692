"""Packets that leave by a descriptor: a TAP, or a packet socket. One write each.

The first bytes, which were looked at, are private; the others go from the sender's pages where these are mapped, or
else are private as well by then. A descriptor that does not take a packet loses it; one that is gone is told to the
control thread, once.
"""

from __future__ import annotations

from errno import EAGAIN, EBADFD, ENETDOWN, ENOBUFS, ENODEV, ENXIO
from typing import Any

from pvdrivers.iovec import put_iovec
from pvdrivers.syscalls import write, writev
from pvdrivers.worker.marks import mark_lost, ring_at, stats_at
from pvdrivers.worker.records import RING_ACTIVE
from rings.atomics import i64
from rings.jit import inline, kernel
from rings.vnet import CSUM_BLANK, VNET_SIZE, put_vnet

from .records import N_DROPPED, N_FAILED, N_RECEIVED, N_UNSUPPORTED, fragment_at, packet_at, switch_at


@inline
def is_gone(error: int) -> bool:
    """Whether an -errno says that there is no interface behind a descriptor any more."""
    return error == -EBADFD or error == -ENXIO or error == -ENODEV or error == -ENETDOWN


@inline
def _wrote(ra: int, packet: Any, result: int) -> None:
    stats = stats_at(ring_at(ra)["stats"])
    if result >= 0:
        stats["kinds"][N_RECEIVED] += 1
        stats["bytes_written"] += packet["size"]
    elif result == -EAGAIN or result == -ENOBUFS:
        stats["kinds"][N_DROPPED] += 1
    else:
        stats["kinds"][N_FAILED] += 1
        if is_gone(result):
            mark_lost(ra, result)


@kernel
def goes_from_pages(pa: int) -> bool:
    """Whether what is not private of a packet may stay where it is, in pages that are mapped. Where the headers are not
    all private, everything is wanted."""
    packet = packet_at(pa)
    if packet["csum"] == CSUM_BLANK and packet["l4"] == 0:
        return False
    start = i64(0)
    for f in range(packet["fragments"]):
        fragment = fragment_at(pa, f)
        start += i64(fragment["length"])
        if start > packet["have"] and fragment["page"] == 0:
            return False
    return True


@kernel
def _pieces(pa: int, at: int, pieces: int) -> int:
    """An IOVEC for the private bytes from `at` on, and for each piece that is in a page: how many; 0 if one is not."""
    packet = packet_at(pa)
    put_iovec(pieces, 0, at, packet["data"] + packet["have"] - at)
    n = i64(1)
    start = i64(0)
    for f in range(packet["fragments"]):
        fragment = fragment_at(pa, f)
        length = i64(fragment["length"])
        skip = max(packet["have"] - start, 0)
        if skip < length:
            if fragment["page"] == 0:
                return i64(0)
            put_iovec(pieces, n, fragment["page"] + i64(fragment["offset"]) + skip, length - skip)
            n += 1
        start += length
    return n


@kernel
def to_port(swa: int, pa: int, ra: int) -> None:
    """Send a packet by a queue."""
    packet = packet_at(pa)
    ring = ring_at(ra)
    if ring["state"] != RING_ACTIVE:
        return
    at = packet["data"] - VNET_SIZE
    pieces = switch_at(swa)["pieces"]
    n = i64(_pieces(pa, at, pieces)) if packet["have"] < packet["size"] else i64(1)
    if n == 0 or not put_vnet(at, packet["data"], packet["have"], packet["csum"], packet["gso_size"]):
        stats_at(ring["stats"])["kinds"][N_UNSUPPORTED] += 1
    elif n > 1:
        _wrote(ra, packet, i64(writev(ring["event_fd"], pieces, n)))
    else:
        _wrote(ra, packet, i64(write(ring["event_fd"], at, packet["size"] + VNET_SIZE)))
