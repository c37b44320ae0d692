"""Packets that come by a descriptor: a TAP, or a packet socket. Entries of the worker; there is no ring behind them.

One read a packet until there is no more, then all of them are forwarded. Each has a struct virtio_net_hdr before it
(rings.vnet), so that segments (GSO) and blank checksums come whole. Who is gone is told to the control thread, once.
"""

from __future__ import annotations

from errno import EINTR

from pvdrivers.syscalls import read
from pvdrivers.worker.marks import mark_lost, ring_at, stats_at, worker_at
from rings.atomics import i64
from rings.jit import inline, kernel, seam_function
from rings.vnet import CSUM_BLANK, CSUM_NONE, VNET_SIZE, complete, from_vnet, is_elsewhere

from .forward import forward, packet_of
from .port_out import is_gone
from .port_socket import read_socket
from .records import (
    BATCH,
    HEADROOM,
    MIN_SIZE,
    MOST_BYTES,
    N_REFUSED,
    N_SENT,
    P_SEND,
    STRIDE,
    packet_at,
    switch_at,
)
from .table import join

MOST_SIZE = 65535
"""Bytes of a packet that the rings can say."""


@inline
def _take(pa: int, size: int) -> bool:
    """A packet of which all `size` bytes are private, and come from nobody's pages. False: it cannot be sent on."""
    packet = packet_at(pa)
    header = packet["data"] - VNET_SIZE
    if not from_vnet(header, packet, size):
        return False
    if packet["csum"] == CSUM_BLANK and is_elsewhere(header, packet["data"], size):
        # Of the headers that a receiver looks at nothing is known, and segments would each have another.
        packet["csum"] = CSUM_NONE
        if packet["gso_size"] != 0 or not complete(header, packet["data"], size):
            return False
    packet["verdict"], packet["status"], packet["fault"] = P_SEND, 0, 0
    packet["slots"], packet["extras"], packet["fragments"], packet["flags"] = 0, 0, 0, 0
    packet["have"], packet["want"], packet["domid"] = size, size, 0
    packet["stage"], packet["said"] = 0, 0
    return True


@kernel
def _read_some(ra: int, swa: int, most: int) -> int:
    """Read up to `most` packets into the switch's; how many, and 1 << 32 more if there is nothing left to be read."""
    ring = ring_at(ra)
    stats = stats_at(ring["stats"])
    n = i64(0)
    for _ in range(most):
        pa = packet_of(swa, n)
        packet = packet_at(pa)
        packet["data"] = switch_at(swa)["data"] + n * STRIDE + HEADROOM
        if ring["priv"] == 0:
            size = i64(read(ring["event_fd"], packet["data"] - VNET_SIZE, MOST_BYTES + VNET_SIZE))
        else:
            size = i64(read_socket(ring["event_fd"], ring["priv"], pa))
        if size < 0:
            if is_gone(size):
                mark_lost(ra, size)
            return n if size == -EINTR else n | 1 << 32
        size -= VNET_SIZE
        if ring["lost"] != 0 and size >= MIN_SIZE:
            mark_lost(ra, i64(0))
        if size < MIN_SIZE or size > MOST_SIZE or not _take(pa, size):
            stats["kinds"][N_REFUSED] += 1
            continue
        stats["kinds"][N_SENT] += 1
        stats["bytes_read"] += size
        n += 1
    return n


@seam_function
def step_port(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of a queue of a port. 1 if more may be there."""
    ring = ring_at(ra)
    ring["blocked"] = 1  # there is no ring to be looked at
    porta = ring["device"]
    if abandoned != 0:
        return 0
    swa = ring["local"]
    join(swa, porta, worker_at(wa)["now"])
    found = _read_some(ra, swa, min(budget, BATCH))
    n = found & 0xFFFFFFFF
    if n > 0:
        forward(wa, swa, porta, n, ring["stats"])
    return 1 if found >> 32 == 0 else 0


@seam_function
def finish_port(wa: int, ra: int, _b: int, _c: int) -> int:
    """RING.finish: nothing is left to be done."""
    return 0
