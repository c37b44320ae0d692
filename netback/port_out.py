"""Packets that leave by a descriptor: a TAP, or a packet socket. One write each; all their bytes are private by then.

A descriptor that does not take a packet loses it; one that is gone is told to the control thread, once.
"""

from __future__ import annotations

from errno import EAGAIN, EBADFD, ENETDOWN, ENOBUFS, ENODEV, ENXIO
from typing import Any

from pvdrivers.syscalls import write
from pvdrivers.worker.marks import mark_lost, ring_at, stats_at
from pvdrivers.worker.records import RING_ACTIVE
from rings.atomics import i64
from rings.jit import inline, kernel
from rings.vnet import VNET_SIZE, put_vnet

from .records import N_DROPPED, N_FAILED, N_RECEIVED, N_UNSUPPORTED, packet_at


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
def to_port(pa: int, ra: int) -> None:
    """Send a packet, of which all bytes are private, by a queue."""
    packet = packet_at(pa)
    ring = ring_at(ra)
    if ring["state"] != RING_ACTIVE:
        return
    at = packet["data"] - VNET_SIZE
    if packet["have"] < packet["size"] or not put_vnet(
        at, packet["data"], packet["size"], packet["csum"], packet["gso_size"]
    ):
        stats_at(ring["stats"])["kinds"][N_UNSUPPORTED] += 1
        return
    _wrote(ra, packet, i64(write(ring["event_fd"], at, packet["size"] + VNET_SIZE)))
